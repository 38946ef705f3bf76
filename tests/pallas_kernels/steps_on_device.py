"""Whole decode steps through a device's kernels against XLA, on a Hopper GPU or TPU, by hand:

    JAX_DEFAULT_MATMUL_PRECISION=highest python -m tests.pallas_kernels.steps_on_device

A budget of all pages, so that no tie of scores decides what is loaded. Exits with 1 if logits differ.
"""

import argparse
import dataclasses
import sys

import jax
import numpy as np

import retro_jax as rj
from retro_jax.models import Experts, LayerKind, ModelConfig, Rope, random_params

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
SINKS = LayerKind(Rope(), sinks=True, mlp="experts")
MODELS = {
    "plain": MODEL,
    # As gpt-oss, whose window is shorter than the texts: rings that are written over. All experts are chosen:
    # between two that score alike rounding decides, which is seen in a fifth of the logits of a token.
    "sinks, windows and experts": dataclasses.replace(
        MODEL,
        num_layers=4,
        head_dim=64,
        layer_kinds=tuple(dataclasses.replace(SINKS, window=window) for window in (128, None, 128, None)),
        experts=Experts(8, 8, 512, biases=True, swiglu_limit=7.0, swiglu_alpha=1.702),
        qkv_bias=True,
        output_bias=True,
    ),
    # As Gemma 3, with one KV head and a window that is no multiple of a page.
    "windows of wide heads": dataclasses.replace(
        MODEL,
        num_layers=4,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        layer_kinds=tuple(LayerKind(Rope(), window=window) for window in (100, None, 100, None)),
        norms="both",
        qk_norm=True,
        activation="gelu_tanh",
    ),
}
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
MIXED = [
    rj.preset("mean-key", dense_layers=0, **WHOLE),
    rj.preset("paper", dense_layers=0, **WHOLE),
    rj.preset("quest", dense_layers=0, **WHOLE),
]
"""Of models with layers of several kinds: those with a window serve past queries, too."""
TOLERANCE = 0.03
"""Relative: a few roundings of bfloat16, which each layer adds to."""


def logits(params, model, config, tokens):
    """Of every step along given tokens."""
    prefill = jax.jit(rj.prefill, static_argnums=(1, 2), static_argnames="capacity")
    step = jax.jit(rj.decode_step, static_argnums=(1, 2))
    lengths = np.array([TOKENS, 37], np.int32)
    state, _ = prefill(params, model, config, tokens[:, :TOKENS], lengths, capacity=CAPACITY)
    found = []
    for index in range(STEPS):
        state, out = step(params, model, config, state, tokens[:, TOKENS + index])
        found.append(np.asarray(out, np.float64))
    return np.stack(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models to check: those whose name contains this")
    chosen = parser.parse_args().only
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, TOKENS + STEPS)).astype(np.int32)
    failed = 0
    for name, model in MODELS.items():
        if chosen not in name:
            continue
        params = random_params(model, jax.random.key(0))
        for config in CONFIGS if name == "plain" else MIXED:
            expected = logits(params, model, dataclasses.replace(config, implementation="xla"), tokens)
            got = logits(params, model, config, tokens)
            error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            passed = bool(np.isfinite(got).all()) and error < TOLERANCE
            failed += not passed
            print(f"{'ok  ' if passed else 'FAIL'} {error:.1e} {name}: {config}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
