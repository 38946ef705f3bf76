"""Words in pictures: lists, counts and numbers, shortened and wrapped to what there is room for."""

import math
from collections.abc import Sequence
from functools import cache, lru_cache

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

DPI = 160
"""Dots per inch of every picture: how wide a text is depends on it, a little."""


def plain(value: float) -> str:
    """A number for a tick: whole ones with all their digits, others as short as they can be."""
    whole = abs(value) >= 1 and math.isclose(value, round(value), rel_tol=1e-6)
    return f"{value:.0f}" if whole else f"{value:.4g}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names in words: the first few, and how many more there are."""
    told = ", ".join(shortened(name, 40) for name in names[:most])
    return f"{told} and {len(names) - most} more" if len(names) > most else told


def counted(number: int, noun: str, plural: str = "") -> str:
    """How many there are of something, as "1 text" or "4 texts"; the plural has an s unless it is given."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def shortened(text: str, most: int = 60) -> str:
    """Text of so many characters at most, its middle left out; more of its end stays, as of a path."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    end = (most - 1) * 2 // 3
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def wrapped(text: str, width: float, size: float) -> str:
    """Text in lines of at most so many inches at a font size in points; words that are wider are broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _inches(longer, size) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and _inches(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(line for line in lines if line)


@lru_cache(maxsize=4096)
def _inches(text: str, size: float) -> float:
    dots, _, _ = _renderer().get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
    return dots / DPI


@cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, DPI)


def line_count(text: str) -> int:
    """Lines of a text."""
    return text.count("\n") + 1
