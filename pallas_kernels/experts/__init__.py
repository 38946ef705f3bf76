"""Products with matrices that are chosen at run time: experts' weights, of which few are read."""

from pallas_kernels.experts.api import chosen_products

__all__ = ["chosen_products"]
