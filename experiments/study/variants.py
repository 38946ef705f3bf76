"""What a study runs: the paper's method, what it could repair at most, its rival, and preset mean-key."""

import itertools
from collections.abc import Iterable, Mapping

from retro_jax.experiments.compare.ladder import LADDER, PAPER_WINDOWS
from retro_jax.presets import PRESETS

LEARNED = "learned"  # as retro_jax.selectors has it, which starts JAX

QUEST, SINK, EXACT = "Quest", "Quest, a sink page", ", exact cache"
PRESET = "preset mean-key"
RECTIFIED = (8, 16, 32, 64)
LOADED_OTHERWISE = {
    ", top-p 0.9": {"budget_top_p": 0.9},
    ", top-p 0.95": {"budget_top_p": 0.95},
    ", anchors every 4 layers": {"anchor_every": 4},
    ", selected every 4 tokens": {"select_every": 4},
    ", selected every 16 tokens": {"select_every": 16},
}
"""Fewer of the budget's pages, or those of another layer or token, in words after the names of what runs so:
Quest with a sink page and preset mean-key."""
METHODS = {"tova": "TOVA", "streaming": "StreamingLLM"}
"""Methods that keep what they chose once, by their names in print."""
LEARNED_PAGES, LEARNED_CHANNELS = (4, 8, 16), (16, 32, 64)
"""Of learned scores: the pages that they choose, and the channels of a summary."""
WINDOW = 4
"""That of the rows which add a window to something else."""


LOWER_HALF = {"method": "retro", "window": WINDOW, "revised_layers": 0.5}


def revised(window: int, sink: bool = False) -> str:
    """Returns the name of RetroAttention as in the paper, with a sink page or without."""
    return f"RetroAttention, w = {window}" + ", a sink page" * sink


def partly_revised(of: str) -> str:
    """Returns the name of a row whose window revises in the lower half of the layers only."""
    return f"{of}, lower half"


def rectified(every: int) -> str:
    """Returns the name of Quest with a sink page and a dense pass every so many tokens."""
    return f"{SINK}, rectified every {every} tokens"


def _ladder() -> dict[str, Mapping[str, object]]:
    found, fields = {}, PRESETS["quest"]
    for words, part in LADDER:
        fields = {**fields, **part}
        found[f"+ {words}"] = fields
    return dict(list(found.items())[2:-1])  # its ends are PRESET and Quest, whose sink page has a row as well


def _beyond() -> dict[str, Mapping[str, object]]:
    """Preset mean-key and two with more parts: each alone, with a window, and with an exact cache."""
    found = {}
    for words, part in (
        ("", {}),
        (", pages of 8", {"page_size": 8}),
        (", pages of 8, a residual", {"page_size": 8, "residual_pages": 8}),
    ):
        fields = {**PRESETS["mean-key"], **part}
        found[PRESET + words] = fields
        found[f"{PRESET}{words}, w = {WINDOW}"] = {**fields, "method": "retro", "window": WINDOW}
        if not part:
            found[partly_revised(f"{PRESET}, w = {WINDOW}")] = {**fields, **LOWER_HALF}
        found[PRESET + words + EXACT] = {**fields, "rectify_every": 1}
    return found


def with_caches(
    variants: Mapping[str, Mapping[str, object]], dtypes: Iterable[str | None]
) -> dict[str, Mapping[str, object]]:
    """Returns variants and, with caches of each dtype, full attention and all of them.

    A budget of pages buys the same pages then, for fewer bytes; a second row spends the bytes that Quest
    would read from a cache in the model's dtype. A budget of traffic has that row only.

    Args:
      variants: fields of `DecodeConfig` beside the budget, by name.
      dtypes: values of `DecodeConfig.cache_dtype`; the variants themselves have None.
    """
    found = dict(variants)
    for dtype in filter(None, dtypes):
        cache = {"cache_dtype": dtype}
        found[f"full attention, {dtype} cache"] = {"method": "full", "sink_pages": 0, **cache}
        for name, fields in variants.items():
            words, traffic = f"{name}, {dtype} cache", {**fields, "budget_covers": "traffic"}
            if fields != traffic:
                found[words] = {**fields, **cache}
                if fields["method"] not in ("quest", "retro") or traffic in variants.values():
                    continue
            found[f"{words}, equal bytes"] = {**traffic, **cache}
    return found


def learned(page_size: int, channels: int) -> tuple[str, Mapping[str, object]]:
    """Returns the name and the fields of a row: the preset with a learned score in place of mean keys."""
    fields = {"score": LEARNED, "page_size": page_size, "score_channels": channels}
    return f"learned score, {channels} channels, pages of {page_size}", {**PRESETS["mean-key"], **fields}


def every_variant() -> dict[str, Mapping[str, object]]:
    """Returns `variants` with every kind of cache, and learned scores of all sizes."""
    from pallas_kernels import CODES

    sizes = itertools.product(LEARNED_PAGES, LEARNED_CHANNELS)
    return with_caches(variants(), CODES) | dict(itertools.starmap(learned, sizes))


def variants() -> dict[str, Mapping[str, object]]:
    """Returns the fields of `DecodeConfig` beside the budget that each variant sets, by its name."""
    quest = PRESETS["quest"]
    sink = {**quest, "sink_pages": 1}
    return {
        QUEST: quest,
        **{revised(w): {**PRESETS["paper"], "window": w} for w in PAPER_WINDOWS},
        QUEST + EXACT: {**quest, "rectify_every": 1},
        SINK: sink,
        revised(WINDOW, sink=True): {**sink, "method": "retro", "window": WINDOW},
        partly_revised(revised(WINDOW, sink=True)): {**sink, **LOWER_HALF},
        SINK + EXACT: {**sink, "rectify_every": 1},
        **{rectified(every): {**sink, "rectify_every": every} for every in RECTIFIED},
        **_ladder(),
        **_beyond(),
        **{
            name + words: {**base, **part}
            for name, base in ((SINK, sink), (PRESET, PRESETS["mean-key"]))
            for words, part in LOADED_OTHERWISE.items()
        },
        **{words: {"method": name, "sink_pages": 1} for name, words in METHODS.items()},
    }
