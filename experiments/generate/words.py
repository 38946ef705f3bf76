"""What `generate` tells of a reply beside it."""

import jax.numpy as jnp

from pallas_kernels import pages_for
from retro_jax import Generation, Model
from retro_jax.budget import Budget, budget_pages
from retro_jax.experiments.io.progress import Rates
from retro_jax.plan import layer_plan


def summary(result: Generation, rates: Rates) -> str:
    """One line on how fast it was and what it loaded."""
    parts = [f"{sum(map(len, result.tokens))} tokens in {rates.seconds:.1f} s{compiling(rates)}"]
    rate = rates.per_second("decode")
    if rate:
        parts.append(f"{rate * len(result.tokens):.1f} tokens/s after the first steps")
    if result.metrics is not None:
        metrics = result.metrics.summary()
        parts.append(f"{metrics['kv_bytes'] / 1e6:.2f} MB of KV cache read per token")
        if "checks" in metrics:
            parts.append(_checks(metrics))
        elif (exposure := metrics["exposure"][-1]) is not None:
            parts.append(f"{metrics['pages_loaded']:.1f} pages per step and KV head, exposure {exposure:.2f}")
    return "[" + "; ".join(parts) + "]"


def _checks(metrics: dict) -> str:
    """What drafts and their checks came to."""
    accepted = " ".join(f"{share:.2f}" for share in metrics["acceptance"]) or "none drafted"
    return (
        f"{metrics['tokens_per_check']:.2f} tokens per check of {metrics['drafts_per_check']:.2f} drafts, "
        f"which read {metrics['check_bytes_per_check'] / 1e6:.2f} MB and "
        f"{metrics['draft_bytes_per_check'] / 1e6:.2f} MB; accepted, by position: {accepted}"
    )


def compiling(rates: Rates) -> str:
    """How much of the time was compiling, if any that shows."""
    seconds = rates.show.compile_seconds
    return f", {seconds:.1f} s of them compiling" if seconds >= 0.05 else ""


def covered(result: Generation, model: Model) -> str:
    """A line that says so where no layer is sparse, or the budget covered all of the context."""
    config, tokens = result.config, int(result.state.length.max())
    if config.attention.dense or result.metrics is None:
        return ""
    if not layer_plan(model.config, config).num_sparse:
        return (
            f"[no layer of {model.config.name} is sparse: each has a sliding window or is one of the first "
            f"{config.dense_layers} with full attention, so {config.method!r} did what full attention does; "
            "lower --dense-layers, or use a model with more such layers]"
        )
    itemsize = jnp.dtype(model.config.dtype).itemsize
    (pages,) = budget_pages(
        config, Budget.of(config, 1), jnp.array([tokens]), model.config.head_dim, itemsize
    )
    if pages < pages_for(tokens, config.page_size):
        return ""
    return (
        f"[the budget of {int(pages) * config.page_size} tokens covers all {tokens} tokens of context, so "
        f"{config.method!r} did what full attention does; lower --budget-tokens, or continue a longer text]"
    )
