"""Mixtures of experts for few rows: a router, and the experts that it chose, of which each is read once."""

from pallas_kernels.experts.api import mixture_of_experts

__all__ = ["mixture_of_experts"]
