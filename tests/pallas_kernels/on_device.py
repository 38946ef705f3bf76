"""Every supported configuration of a device's kernels against the reference, on a Hopper GPU or TPU, by hand:

    JAX_DEFAULT_MATMUL_PRECISION=highest python -m tests.pallas_kernels.on_device --out report.json

Random ragged inputs, NaN in everything unwritten, each call twice. Exits with 1 if anything differs.
"""

import argparse
import functools
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import CODES, dequantized, gpu, kernels_of_device, tpu
from pallas_kernels.attention import api as attention_api
from pallas_kernels.attention import reference as attention_reference
from pallas_kernels.scores import GROUP_REDUCE
from pallas_kernels.selection import api as selection_api
from pallas_kernels.selection import reference as selection_reference
from pallas_kernels.selection.gpu.kernels import CHANNELS
from pallas_kernels.sliding import reference as sliding_reference
from pallas_kernels.update import api as update_api
from pallas_kernels.update import reference as update_reference
from retro_jax.experiments.io.provenance import provenance
from tests.pallas_kernels.equality import FUSED, SCORED, relative
from tests.pallas_kernels.inputs import (
    dtype_beside,
    pages_as,
    random_cache,
    random_product,
    random_retro_inputs,
    random_statistics,
    random_update,
    window_positions,
)
from tests.pallas_kernels.page_sets import ROUNDING, largest_distance
from tests.pallas_kernels.rows_on_device import Experts, Parts

B, K = 5, 2
ROWS = [(1, 1), (4, 4), (16, 4), (2, 8), (3, 5), (1, 16), (8, 8), (5, 3), (4, 1)]  # (window, group)
KERNELS = kernels_of_device()
if KERNELS is None:
    sys.exit(f"there are no kernels for {jax.devices()[0].device_kind}")
attention, selection, update = (getattr(api, KERNELS) for api in (attention_api, selection_api, update_api))
SUPPORTED = gpu if KERNELS == "mosaic_gpu" else tpu


class Attention:
    """Retrospective attention."""

    def __init__(self, dim, page_size, window, group, dtype):
        self.name = f"retro_attention D={dim} S={page_size} W={window} G={group} {jnp.dtype(dtype).name}"
        self.sizes = dim, page_size, window, group
        self.dtype = dtype
        self.kernel, self.reference = (
            jax.jit(attention.retro_attention),
            jax.jit(attention_reference.retro_attention),
        )

    def inputs(self, rng):
        dim, page_size, window, group = self.sizes
        pages = 1536 // page_size
        lengths = rng.integers(1, pages * page_size + 1, B)
        q, cache, *rest = random_retro_inputs(
            rng, lengths, window, group, page_size, K, dim, pages, places=max(pages // 2, 1)
        )
        q = jnp.asarray(q, dtype_beside(self.dtype))
        return q, pages_as(cache, self.dtype), *map(jnp.asarray, rest)

    def errors(self, inputs, got, expected):
        return max(relative(got[0], expected[0]), relative(got[1], expected[1])), bool(
            (got[2] == expected[2]).all()
        )


class Window(Attention):
    """The same as a decode step takes it, which moves the output cache of every other sequence on."""

    def __init__(self, dim, page_size, window, group, dtype):
        super().__init__(dim, page_size, window, group, dtype)
        self.name = self.name.replace("retro_attention", "attend_window")
        self.kernel, self.reference = (
            jax.jit(functools.partial(module.attend_window, dtype=jnp.float32))
            for module in (attention, attention_reference)
        )

    def inputs(self, rng):
        return *super().inputs(rng), jnp.arange(B) % 2 == 0

    def errors(self, inputs, got, expected):
        error, same = super().errors(inputs, got, expected)
        error = max(error, *(relative(*pair) for pair in zip(got[3:5], expected[3:5], strict=True)))
        if self.sizes[2] > 1:
            selected = np.arange(inputs[2].shape[2]) < np.asarray(inputs[3])[..., None]
            first = [np.asarray(result[5])[selected] for result in (got, expected)]
            same &= np.array_equal(*first)
        return error, same


class Dense(Attention):
    """Dense attention of one query."""

    def __init__(self, dim, page_size, window, group, dtype):
        super().__init__(dim, page_size, 1, group, dtype)
        self.name = f"dense_attention D={dim} S={page_size} G={group} {jnp.dtype(dtype).name}"
        self.kernel, self.reference = (
            jax.jit(attention.dense_attention),
            jax.jit(attention_reference.dense_attention),
        )

    def inputs(self, rng):
        q, pages, _, _, _, positions, _, _ = super().inputs(rng)
        return q, pages, positions

    def errors(self, inputs, got, expected):
        return relative(got, expected), True


class Sliding(Attention):
    """Attention of a step's queries to a sliding window, in a ring of some more places."""

    def __init__(self, dim, page_size, window, group, dtype):
        super().__init__(dim, page_size, window, group, dtype)
        self.name = f"window_attention D={dim} S={page_size} W={window} G={group} {jnp.dtype(dtype).name}"
        self.ring = 500 + window - 1
        sizes = {"window": 500, "ring": self.ring}
        self.kernel = jax.jit(functools.partial(attention.window_attention, **sizes))
        self.reference = jax.jit(functools.partial(sliding_reference.window_attention, **sizes))

    def inputs(self, rng):
        dim, page_size, window, group = self.sizes
        newest = rng.integers(-1, 4 * self.ring, B)
        filled = np.minimum(newest + 1, self.ring)
        pages = random_cache(rng, filled, page_size, K, dim, -(-self.ring // page_size))
        q = jnp.asarray(rng.standard_normal((B, window, K * group, dim)), dtype_beside(self.dtype))
        positions = jnp.asarray(window_positions(newest + 1, window))
        return q, pages_as(pages, self.dtype), positions, jnp.asarray(rng.standard_normal(K * group))

    def errors(self, inputs, got, expected):
        return relative(got, expected), True


class Select:
    """Page selection."""

    def __init__(self, dim, page_size, score, kind, group_reduce, group, pages, dtype):
        by = f"{score} of {kind} {group_reduce}"
        self.name = f"select_pages D={dim} S={page_size} {by} G={group} P={pages} {jnp.dtype(dtype).name}"
        self.sizes, self.kind, self.dtype = (dim, page_size, group, pages), kind, dtype
        self.score, self.reduce, self.most = score, group_reduce, min(200, pages)
        arguments = {
            "page_size": page_size,
            "capacity": self.most,
            "score": score,
            "group_reduce": group_reduce,
            "sink_pages": 1,
        }
        self.kernel = jax.jit(functools.partial(selection.select_pages, **arguments))
        self.reference = jax.jit(functools.partial(selection_reference.select_pages, **arguments))

    def inputs(self, rng):
        dim, page_size, group, pages = self.sizes
        positions = rng.integers(0, pages * page_size, B).astype(np.int32)
        statistics = random_statistics(rng, positions + 1, page_size, K, pages, self.kind, dim, self.dtype)
        budgets = np.minimum(rng.integers(2, self.most + 1, B), positions // page_size + 1).astype(np.int32)
        budgets[rng.integers(B)] = 0
        q = rng.standard_normal((B, K * group, dim))
        return (
            jnp.asarray(q, self.dtype),
            statistics,
            jnp.asarray(positions),
            jnp.asarray(budgets),
        )

    def errors(self, inputs, got, expected):
        """The largest distance from the last page chosen to one that differs, over the size of its score."""
        arguments = {
            "page_size": self.sizes[1],
            "score": self.score,
            "group_reduce": self.reduce,
            "sink_pages": 1,
        }
        worst = largest_distance(got, expected, *inputs[:3], **arguments)
        return worst, bool((got[1] == expected[1]).all())


class Update:
    """Page update."""

    def __init__(self, dim, page_size, tokens, kind, dtype):
        self.name = f"update_pages D={dim} S={page_size} T={tokens} {kind} {jnp.dtype(dtype).name}"
        self.sizes, self.kind, self.dtype = (dim, page_size, tokens), kind, dtype
        self.kernel = jax.jit(update.update_pages)
        self.reference = jax.jit(update_reference.update_pages)

    def inputs(self, rng):
        dim, page_size, tokens = self.sizes
        pages = 1024 // page_size
        lengths = rng.integers(1, pages * page_size + 1, B)
        inputs = random_update(rng, lengths, tokens, page_size, K, dim, self.kind, self.dtype, pages)
        inputs[5] = inputs[5].at[rng.integers(B)].set(False)
        return inputs

    def errors(self, inputs, got, expected):
        equal = all(
            np.array_equal(*(np.asarray(array, np.float32) for array in pair), equal_nan=True)
            for pair in zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True)
        )
        return relative(*(result[1].at_float32() for result in (got, expected))), equal


class Heads(Update):
    """Page update and queries from a joined product, with all that there can be between, or some of it."""

    MADE = itertools.cycle((("rope",), ("rope", "norms"), ("rope", "bias", "scale"), ()))

    def __init__(self, dim, page_size, tokens, kind, dtype, group):
        self.sizes, self.kind, self.dtype, self.made = (
            (dim, page_size, tokens, group),
            kind,
            dtype,
            next(self.MADE),
        )
        made = " ".join(self.made)
        self.name = f"heads D={dim} S={page_size} T={tokens} G={group} {kind} {jnp.dtype(dtype).name} {made}"
        options = self.drawn(np.random.default_rng(0))[1]
        self.kernel, self.reference = (
            jax.jit(functools.partial(module.update_from_product, **options))
            for module in (update, update_reference)
        )

    def drawn(self, rng):
        dim, page_size, tokens, group = self.sizes
        pages = 1024 // page_size
        lengths = rng.integers(1, pages * page_size + 1, B)
        return random_product(
            rng, lengths, tokens, page_size, group, dim, self.kind, self.dtype, self.made, pages, 2 * K
        )

    def inputs(self, rng):
        return self.drawn(rng)[0]

    def errors(self, inputs, got, expected):
        """The larger of the errors of queries and of what is written; exact is what is not."""
        pages, wanted, before = (
            np.asarray(dequantized(x), np.float32) for x in (got[1], expected[1], inputs[0])
        )
        kept = ((wanted == before) | (np.isnan(wanted) & np.isnan(before))).all(axis=-1)
        worst = max(relative(got[0], expected[0]), relative(pages[~kept], wanted[~kept]))
        if self.kind:
            worst = max(worst, relative(*(result[2].at_float32() for result in (got, expected))))
        return worst, np.array_equal(pages[kept], wanted[kept], equal_nan=True)


def configurations():
    """Every supported head_dim and page size, the other sizes taking turns."""
    rows = itertools.cycle(ROWS)
    dtypes = itertools.cycle(SUPPORTED.DTYPES)
    served = [name for name in GROUP_REDUCE if name != "mass" or KERNELS == "mosaic_gpu"]
    scores = itertools.cycle((*by, reduce) for by, reduce in itertools.product(SCORED[KERNELS], served))
    kinds, counts, pages = (itertools.cycle(x) for x in (FUSED[KERNELS], (1, 4, 17, 16), (680, 40, 2048)))
    for dim, page_size in itertools.product(SUPPORTED.HEAD_DIMS, SUPPORTED.PAGE_SIZES):
        for _ in range(2):
            yield Attention(dim, page_size, *next(rows), next(dtypes))
            yield Window(dim, page_size, *next(rows), next(dtypes))
        yield Dense(dim, page_size, *next(rows), next(dtypes))
        yield Select(dim, page_size, *next(scores), next(rows)[1], next(pages), next(dtypes))
        yield Update(dim, page_size, next(counts), next(kinds), next(dtypes))
    if KERNELS == "mosaic_gpu":
        of_codes = (64, 128), SUPPORTED.PAGE_SIZES
    else:
        of_codes = SUPPORTED.HEAD_DIMS, SUPPORTED.PAGE_SIZES_IN_8_BITS
    for dim, page_size, codes in itertools.product(*of_codes, CODES):
        yield Attention(dim, page_size, *next(rows), codes)
        yield Dense(dim, page_size, *next(rows), codes)
        yield Update(dim, page_size, next(counts), next(kinds), codes)
    if KERNELS != "mosaic_gpu":
        return
    few = itertools.cycle((1, 4, update_api.FEW_TOKENS))
    for dim, page_size, dtype in itertools.product(SUPPORTED.HEAD_DIMS, (8, 16), (jnp.bfloat16, jnp.int8)):
        yield Heads(dim, page_size, next(few), next(kinds), dtype, next(rows)[1])
    for dim, group, reduce in zip(SUPPORTED.HEAD_DIMS, (9, 16, 12), ("mean", "mass", "max"), strict=True):
        yield Select(dim, 16, "mean_key", "mean_key_int8", reduce, group, next(pages), jnp.bfloat16)
    windows = itertools.product((64, 128), SUPPORTED.PAGE_SIZES, (jnp.bfloat16, *CODES))
    for dim, page_size, dtype in [*windows, (256, 16, jnp.bfloat16)]:
        yield Sliding(dim, page_size, *next(rows), dtype)
    for dim, group, reduce in zip(CHANNELS, (3, 4), ("mass", "mass"), strict=True):
        yield Select(dim, 8, "mean_key", "mean_key_int8", reduce, group, next(pages), jnp.bfloat16)
    mixtures = ((2048, 768, 24, 8, False), (576, 320, 8, 2, True), (64, 64, 200, 4, False))
    for rows, (width, hidden, experts, per_token, biased) in itertools.product((1, 4, 33, 64), mixtures):
        yield Experts(rows, width, hidden, experts, per_token, biased, next(dtypes))
    added = itertools.product((4096, 2048, 8192, 5376, 2880, 576, 48), ((1, 1), (1, 4), (3, 5)))
    for (width, (batch, tokens)), parts in zip(added, itertools.cycle((8, 1)), strict=False):
        for normed in itertools.product((False, True), repeat=2):
            yield Parts(batch, tokens, width, parts, *normed, next(dtypes))


LIMITS = {"select": ROUNDING, "mixture": 2 * 2.0**-8}
"""Of errors; experts round what lies between their products to bfloat16, too."""


def check(configuration, cases):
    """The worst error of random cases, whether exact parts are equal, and two runs bit for bit."""
    rng = np.random.default_rng(0)
    inputs = configuration.inputs(rng)
    kernel = configuration.kernel.lower(*inputs).compile()
    reference = configuration.reference.lower(*inputs).compile()
    worst, exact, repeated = 0.0, True, True
    for _ in range(cases):
        got, again, expected = kernel(*inputs), kernel(*inputs), reference(*inputs)
        error, equal = configuration.errors(inputs, got, expected)
        worst, exact = max(worst, error), exact and equal
        # What lies beyond the counts is as it was: of a selection, and of what is said of a window's pages.
        if not isinstance(configuration, Select):
            results = [x[:5] if isinstance(configuration, Window) else x for x in (got, again)]
            pairs = zip(*map(jax.tree.leaves, results), strict=True)
            repeated &= all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
        inputs = configuration.inputs(rng)
    return {
        "name": configuration.name,
        "cases": cases,
        "error": float(worst),
        "exact": exact,
        "repeated": repeated,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=60, help="random cases of each configuration")
    parser.add_argument("--out", type=Path, help="JSON report; must not exist")
    parser.add_argument("--only", default="", help="operations to check: those whose name contains this")
    flags = parser.parse_args()
    if flags.out and flags.out.exists():
        parser.error(f"{flags.out} exists and is not overwritten")

    def attempt(configuration):
        try:
            return check(configuration, flags.cases)
        except Exception as error:  # reported below: one configuration must not lose the others' results
            message = f"{configuration.name}: {type(error).__name__}: {str(error)[:300]}"
            return {"name": message, "cases": 0, "error": np.inf, "exact": False, "repeated": False}

    rows, made_by = [], provenance()
    with ThreadPoolExecutor(12) as pool:
        running = [pool.submit(attempt, each) for each in configurations() if flags.only in each.name]
        for done in as_completed(running):  # told at once, for runs that are stopped before the last
            rows.append(row := done.result())
            limit = next((most for name, most in LIMITS.items() if row["name"].startswith(name)), 5e-3)
            row["passed"] = row["error"] < limit and row["exact"] and row["repeated"]
            if flags.out:
                flags.out.write_text(json.dumps({"rows": rows, "provenance": made_by}, indent=1))
            result = "ok  " if row["passed"] else "FAIL"
            print(f"{result} {row['error']:.1e} {row['cases']} {row['name']}", flush=True)
    failed = sum(not row["passed"] for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed, {sum(row['cases'] for row in rows)} cases")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
