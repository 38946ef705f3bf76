"""SnapKV (arXiv 2404.14469): the last queries of a prompt vote on what is left of it; then the cache grows.

The budget is that of the first decoded token; every page from there on is kept, so later steps load more. How
many is not known beforehand, so every step through XLA, not through kernels, makes room for all pages.

Differences from the original: pages are kept instead of tokens. The votes of `observation` queries are pooled
by summing them over each page, in place of a pooling over neighbouring tokens, which has the same purpose:
what lies beside a token that matters is kept with it. One set per KV head, by its group's query heads; sink
pages are kept where asked for. Later prompts of a conversation are compressed together with what was left of
earlier ones and with all that was decoded. The first `dense_layers` layers keep everything.
"""

import jax.numpy as jnp

from pallas_kernels import attention_mass, pages_for
from retro_jax.cache import Prompt
from retro_jax.methods.base import Method
from retro_jax.methods.eviction import Eviction, all_alive_with_mass


def init(rules, model, batch, pages):
    """Nothing evicted, nothing observed."""
    shape = batch, rules.observation, model.num_heads, model.head_dim
    prompt = Prompt(
        queries=jnp.zeros(shape, model.dtype),
        at=jnp.full(shape[:2], -1, jnp.int32),
        fresh=jnp.zeros(batch, bool),
    )
    return all_alive_with_mass(rules, model, batch, pages).replace(prompt=prompt)


def votes(rules, layer, query, limits):
    """The votes for a page; the pages of the voters themselves come before any other."""
    kept = layer.kept
    page = jnp.arange(kept.alive.shape[2])
    first = jnp.min(jnp.where(kept.prompt.at >= 0, kept.prompt.at, jnp.iinfo(jnp.int32).max), axis=1)
    voters = page >= (first // rules.page_size)[:, None, None]
    return jnp.where(voters, jnp.finfo(jnp.float32).max, kept.mass)


def observe(rules, layer, q, positions, sinks):
    """Keeps the last queries of the prompt so far, and counts their votes."""
    kept, prompt = layer.kept, layer.kept.prompt
    at = jnp.where(prompt.fresh[:, None], prompt.at, -1)  # else they are of an earlier prompt
    at, queries = jnp.concatenate([at, positions], axis=1), jnp.concatenate([prompt.queries, q], axis=1)
    new = jnp.sum(positions >= 0, axis=1)
    last = new[:, None] + jnp.arange(rules.observation)
    at = jnp.take_along_axis(at, last, axis=1)
    queries = jnp.take_along_axis(queries, last[..., None, None], axis=1)
    by = {"group_reduce": rules.group_reduce, "implementation": rules.implementation}
    mass = attention_mass(queries, layer.pages, at, kept.alive, sinks, **by)

    some = new > 0
    prompt = Prompt(
        queries=jnp.where(some[:, None, None, None], queries, prompt.queries),
        at=jnp.where(some[:, None], at, prompt.at),
        fresh=prompt.fresh | some,
    )
    return kept.replace(mass=jnp.where(some[:, None, None], mass, kept.mass), prompt=prompt)


def check(fields):
    """Raises ValueError if the budget has no room for the pages that a prompt's end always keeps."""
    tokens, page_size = fields.least_tokens, fields.page_size
    always = fields.sink_pages + 1 + pages_for(fields.observation, page_size)
    if pages_for(tokens, page_size) < always:
        raise ValueError(
            f"a budget of {tokens} tokens is below the {always} pages of {page_size} tokens that 'snapkv' "
            f"may have to keep for observation={fields.observation} and sink_pages={fields.sink_pages}; "
            "lower observation or raise the budget"
        )


SNAPKV = Method(
    name="snapkv",
    title="SnapKV",
    help="the end of the prompt decides what stays of it; then the cache grows",
    eviction=Eviction(init=init, priority=votes, observe=observe, grows=True),
    check=check,
)
