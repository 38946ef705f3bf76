"""Whole decode steps through a device's kernels against XLA, on a Hopper GPU or TPU, by hand:

    JAX_DEFAULT_MATMUL_PRECISION=highest python -m tests.pallas_kernels.steps_on_device

A budget of all pages, so that no tie of scores decides what is loaded. Exits with 1 if logits differ.
"""

import dataclasses
import sys

import jax
import numpy as np

import retro_jax as rj
from retro_jax.models import ModelConfig, random_params

STEPS, TOKENS, CAPACITY = 8, 600, 1024
MODEL = ModelConfig(
    name="steps",
    vocab_size=256,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    width=256,
    hidden_width=512,
    max_positions=CAPACITY,
    dtype="bfloat16",
)
WHOLE = {"budget_covers": "pages", "budget_tokens": CAPACITY}
CONFIGS = [
    rj.preset("mean-key", **WHOLE),
    rj.preset("mean-key", method="retro", page_size=8, residual_pages=8, **WHOLE),
    rj.preset("paper", **WHOLE),
    rj.preset("quest", **WHOLE),
    rj.DecodeConfig(score="mean_key", page_size=32, residual_pages=4, **WHOLE),
    rj.DecodeConfig(score="mean_key", statistics="mean_key_int8", group_reduce="max", **WHOLE),
    rj.DecodeConfig(score="oracle", page_size=64, **WHOLE),
    rj.DecodeConfig(window=16, group_reduce="max", **WHOLE),
    rj.DecodeConfig(window=32, page_size=128, **WHOLE),
]
TOLERANCE = 0.03
"""Relative: a few roundings of bfloat16, which each layer adds to."""


def logits(params, config, tokens):
    """Of every step along given tokens."""
    prefill = jax.jit(rj.prefill, static_argnums=(1, 2), static_argnames="capacity")
    step = jax.jit(rj.decode_step, static_argnums=(1, 2))
    lengths = np.array([TOKENS, 37], np.int32)
    state, _ = prefill(params, MODEL, config, tokens[:, :TOKENS], lengths, capacity=CAPACITY)
    found = []
    for index in range(STEPS):
        state, out = step(params, MODEL, config, state, tokens[:, TOKENS + index])
        found.append(np.asarray(out, np.float64))
    return np.stack(found)


def main():
    params = random_params(MODEL, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, TOKENS + STEPS)).astype(np.int32)
    failed = 0
    for config in CONFIGS:
        expected = logits(params, dataclasses.replace(config, implementation="xla"), tokens)
        got = logits(params, config, tokens)
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        passed = bool(np.isfinite(got).all()) and error < TOLERANCE
        failed += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {error:.1e} {config}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
