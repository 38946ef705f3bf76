"""A study's tables, by model and kind of text, as one page of Markdown."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from retro_jax.experiments.io.estimates import BLOCK, UNTOLD, Estimate, estimate, ratio
from retro_jax.experiments.io.tables import markdown, number
from retro_jax.experiments.study.data import Cell
from retro_jax.experiments.study.variants import (
    EXACT,
    PRESET,
    QUEST,
    RECTIFIED,
    SINK,
    WINDOW,
    every_variant,
    rectified,
    revised,
)

SPLITS = {
    QUEST: (QUEST + EXACT, revised(WINDOW)),
    SINK: (SINK + EXACT, revised(WINDOW, sink=True)),
    PRESET: (PRESET + EXACT, f"{PRESET}, w = {WINDOW}"),
    f"{PRESET}, pages of 8": (f"{PRESET}, pages of 8{EXACT}", f"{PRESET}, pages of 8, w = {WINDOW}"),
}
"""A method -> the same with an exact cache, and with a window."""
EXCESS = (
    "Excess is negative log-likelihood (nats per token) over full attention on the same tokens; *of Quest's* "
    "divides it by that of Quest without a sink page, on the same tokens. ± is one standard error of what "
    f"stands before it, paired, from the means of blocks of {BLOCK} tokens; where it says so, from the means "
    "of the texts. A budget up to 1 is a share of the context, above it tokens. An exact cache has the keys "
    "and values of full attention: only the newest query is sparse. MB are those of keys, values and page "
    "statistics that a step loads for a text. "
    f"{UNTOLD}."
)
SPLIT = (
    "Of a method's excess, what is left with an exact cache is missed by the newest query; the rest is due "
    "to the cache that sparse attention wrote. Negative: that cache serves better than an exact one. "
    f"Repaired: how much of the excess a window of {WINDOW} takes away."
)
PAIRED = (*((revised(WINDOW), QUEST), (revised(WINDOW, sink=True), SINK)), (QUEST + EXACT, QUEST))


def page(cells: Sequence[Cell]) -> str:
    """Returns all tables of a study.

    Args:
      cells: of one study; what did not run is left out.
    """
    parts = [
        "# Tables by model and kind of text",
        EXCESS,
        f"## {PRESET.capitalize()}",
        preset_table(cells),
        "## Of Quest's excess",
        *(f"Budget {budget:g}\n\n{ratio_table(cells, budget)}" for budget in _budgets(cells)),
        "## What the newest query misses, and what is stale",
        SPLIT,
        *(f"Budget {budget:g}\n\n{split_table(cells, budget)}" for budget in _budgets(cells)),
        "## Paired differences",
        "Excess less that of the other method, with standard errors from blocks and from texts, and the "
        "number of texts in which it is lower.",
        *(
            f"Budget {budget:g}: {method} less {base}\n\n{paired_table(cells, method, base, budget)}"
            for method, base in PAIRED
            for budget in _budgets(cells)
        ),
        "## Rectification and windows",
        *(f"Budget {budget:g}\n\n{rectification_table(cells, budget)}" for budget in _budgets(cells)),
    ]
    for one in cells:
        n, scored = len(one.texts), one.tokens - one.prompt_tokens
        parts += [
            f"## {one.name}",
            f"{n} texts ({', '.join(one.texts)}), {scored} tokens of each after a prompt of "
            f"{one.prompt_tokens}, {one.dtype}. Full attention: {one.full.mean():.4f} nats per token, "
            f"{one.full_bytes / 1e6:.1f} MB a step.",
            excess_table(one),
        ]
    return "\n\n".join(parts) + "\n"


def preset_table(cells: Sequence[Cell]) -> str:
    """Returns preset mean-key's share of Quest's excess at every budget, without a sink page and with one."""
    body = []
    for one in cells:
        for base, words in ((QUEST, "Quest's"), (SINK, "Quest's with a sink page")):
            shares = [_share(one, PRESET, base, budget) for budget in _budgets(cells)]
            if any(shares):
                body.append(
                    [
                        f"{one.name}: of {words}",
                        *("" if share is None else number(share, 3) for share in shares),
                    ]
                )
    return markdown(["", *(f"{budget:g}" for budget in _budgets(cells))], body)


def ratio_table(cells: Sequence[Cell], budget: float) -> str:
    """Returns each variant's share of Quest's excess at one budget, by model and kind of text."""
    body = []
    for variant in every_variant():
        shares = [_share(one, variant, QUEST, budget) for one in cells]
        if variant != QUEST and any(shares):
            body.append([variant, *("" if share is None else number(share, 3) for share in shares)])
    return markdown(["", *(one.name for one in cells)], body)


def excess_table(one: Cell) -> str:
    """Returns excess and MB a step of every variant at every budget, for one model and kind of text."""
    header = ["", *(words for budget in one.budgets for words in (f"excess at {budget:g}", "MB"))]
    body = []
    for variant in every_variant():
        found = [one.result(variant, budget) for budget in one.budgets]
        if any(found):
            cells = [
                (number(blocks_estimate(run.excess)), f"{run.kv_bytes / 1e6:.1f}") if run else ("", "")
                for run in found
            ]
            body.append([variant, *(text for pair in cells for text in pair)])
    return markdown(header, body)


def split_table(cells: Sequence[Cell], budget: float) -> str:
    """Returns what a method misses, what is stale, and what a window repairs, at one budget."""
    body = []
    for one in cells:
        for method, (exact, window) in SPLITS.items():
            base, bound, own = (one.result(name, budget) for name in (method, exact, window))
            if base is None or bound is None:
                continue
            stale, repaired = base.excess - bound.excess, own and base.excess - own.excess
            body.append([
                f"{one.name}: {method}",
                *(number(blocks_estimate(part)) for part in (base.excess, bound.excess, stale)),
                "" if repaired is None else number(blocks_estimate(repaired)),
            ])  # fmt: skip
    return markdown(["", "excess", "missed", "stale", "repaired"], body)


def paired_table(cells: Sequence[Cell], method: str, base: str, budget: float) -> str:
    """Returns the difference of two methods at one budget, by model and kind of text."""
    body = []
    for one in cells:
        own, other = one.result(method, budget), one.result(base, budget)
        if own is None or other is None:
            continue
        difference = own.excess - other.excess
        by_text = difference.mean(axis=1)
        body.append([
            one.name,
            f"{difference.mean():+.4f}",
            f"{blocks_estimate(difference).error:.4f}",
            f"{text_error(difference):.4f}",
            f"{int((by_text < 0).sum())} of {len(by_text)}",
        ])  # fmt: skip
    return markdown(["", "difference", "± by blocks", "± by texts", "lower in"], body)


def rectification_table(cells: Sequence[Cell], budget: float) -> str:
    """Returns excess and MB a step of dense passes and of a window at one budget, all with a sink page."""
    rows = [SINK, revised(WINDOW, sink=True), *map(rectified, reversed(RECTIFIED)), SINK + EXACT]
    body = []
    for variant in rows:
        found = [one.result(variant, budget) for one in cells]
        if any(found):
            texts = [
                (number(blocks_estimate(run.excess)), f"{run.kv_bytes / 1e6:.1f}") if run else ("", "")
                for run in found
            ]
            body.append([variant, *(text for pair in texts for text in pair)])
    return markdown(["", *(words for one in cells for words in (one.name, "MB"))], body)


def blocks_estimate(values: Float[np.ndarray, "B blocks"]) -> Estimate:
    """Returns the mean of all blocks, with the standard error within texts."""
    return estimate(values, block=1)


def text_error(values: Float[np.ndarray, "B blocks"]) -> float:
    """Returns the standard error of the mean that the texts' means give; NaN for a single text."""
    means = values.mean(axis=1)
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


def _share(one: Cell, variant: str, base: str, budget: float) -> Estimate | None:
    own, other = one.result(variant, budget), one.result(base, budget)
    return None if own is None or other is None else ratio(own.excess, other.excess, block=1)


def _budgets(cells: Sequence[Cell]) -> list[float]:
    found = {budget for one in cells for budget in one.budgets}
    return sorted(found, key=lambda budget: (budget <= 1, budget))
