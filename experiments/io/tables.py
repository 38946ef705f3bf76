"""Markdown tables that can also be read as they are, and the numbers in them."""

import math
from collections.abc import Sequence

from retro_jax.experiments.io.estimates import Estimate


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with aligned columns; all but the first are right-aligned."""
    widths = [max(3, *(len(line[column]) for line in [header, *body])) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *padded[1:]]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([line(header), rule, *map(line, body)])


def number(value: Estimate, digits: int = 4) -> str:
    """Returns mean ± standard error; the mean alone where the error is 0 or not known, - for none."""
    if math.isnan(value.mean):
        return "-"
    if not value.error > 0:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ± {value.error:.{digits}f}"


def rounded(value: float | None) -> str:
    """Returns a number with three digits or all before the point; nothing for None."""
    if value is None:
        return ""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
