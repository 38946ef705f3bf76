"""Both ways to decode many prompts beside each other and beside what bytes allow: numbers, table, picture."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from retro_jax.experiments.io.tables import markdown
from retro_jax.experiments.pictures.files import pictures
from retro_jax.experiments.pictures.panels import Curves, Line, Scale, known_looks, looks
from retro_jax.experiments.pictures.words import counted, shortened


class Asked(Protocol):
    """What was asked for."""

    replies: Sequence[int]

    def most_gain(self, slots: int) -> float:
        """The gain by idle slots alone."""
        ...


@dataclass(frozen=True)
class Made:
    """One run's replies.

    Attributes:
      tokens: of each.
      logprobs: the logarithms of their probabilities.
      seconds: that all took.
      kv_bytes: of the cache that all decode steps read; None: not known.
    """

    tokens: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    seconds: float
    kv_bytes: float | None = None


@dataclass(frozen=True)
class Bytes:
    """What a decode step must read, and how fast: bytes of the weights, 1e9 bytes per second."""

    weights: int
    gb_per_s: float


def compared(name: str, slots: int, asked: Asked, fixed: Made, many: Made | None, bytes_read: Bytes) -> dict:
    """Both ways of one method beside each other, as JSON values; None where there is no such run."""
    tokens = sum(asked.replies)
    row = {
        "name": name,
        "slots": slots,
        "tokens": tokens,
        "fixed_seconds": fixed.seconds,
        "fixed_tokens_per_s": tokens / fixed.seconds,
        "most_gain": asked.most_gain(slots),
    }
    names = ("many_seconds", "many_tokens_per_s", "gain", "limit_tokens_per_s", "cache_share", "parted")
    if many is None:
        return row | dict.fromkeys(names)
    weights = bytes_read.weights * tokens / slots
    found = (
        many.seconds,
        tokens / many.seconds,
        fixed.seconds / many.seconds,
        tokens / (weights + many.kv_bytes) * bytes_read.gb_per_s * 1e9,
        many.kv_bytes / (weights + many.kv_bytes),
        parted(fixed, many),
    )
    return row | dict(zip(names, found, strict=True))


def parted(fixed: Made, many: Made) -> list[dict]:
    """Replies that differ: which, after how many tokens, and how far apart the log-probabilities of both are.

    Both choose the most likely token: where they part, that distance is what rounding made of a tie.
    """
    found = []
    for index, (one, other) in enumerate(zip(fixed.tokens, many.tokens, strict=True)):
        differing = [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if differing:
            after = differing[0]
            gap = abs(fixed.logprobs[index][after] - many.logprobs[index][after])
            found.append({"reply": index, "after": after, "gap": gap})
    return found


def throughput_report(values: dict) -> str:
    """Returns the results as Markdown.

    Args:
      values: as in results.json.
    """
    replies, count, device = values["replies"], len(values["replies"]), values["provenance"]["device"]
    parts = [
        f"{values['model']} ({values['dtype']}) on {device}: {count} prompts, replies of {min(replies)} to "
        f"{max(replies)} tokens, {sum(replies)} in all. The limit is {values['weight_bytes'] / 1e9:.3g} GB "
        "of weights for one token of every slot, and what each of them reads of the cache, at "
        f"{values['ceiling_gb_per_s']:.4g} GB/s."
    ]
    header = [
        "", "slots", "fixed batches (tokens/s)", "continuous (tokens/s)", "times", "by idle slots alone",
        "limit (tokens/s)", "cache, of the bytes", "same replies", "largest gap where they part",
    ]  # fmt: skip
    for number, context in enumerate(values["contexts"]):
        parts.append(f"{_told(context).capitalize()}:")
        body = []
        for row in values["rows"]:
            if row["context"] != number:
                continue
            cells = [row["name"], str(row["slots"]), f"{row['fixed_tokens_per_s']:.1f}"]
            if row["many_seconds"] is None:
                body.append([*cells, "", "", f"{row['most_gain']:.2f}", "", "", "", ""])
                continue
            apart = row["parted"]
            cells += [
                f"{row['many_tokens_per_s']:.1f}",
                f"{row['gain']:.2f}",
                f"{row['most_gain']:.2f}",
                f"{row['limit_tokens_per_s']:.1f}",
                f"{row['cache_share']:.2f}",
                f"{count - len(apart)} of {count}",
                f"{max(each['gap'] for each in apart):.1e}" if apart else "",
            ]
            body.append(cells)
        parts.append(markdown(header, body))
    return "\n\n".join(parts)


def _told(context: dict) -> str:
    low, high = min(context["prompts"]), max(context["prompts"])
    return f"prompts of {low} tokens" if low == high else f"prompts of {low} to {high} tokens"


def throughput_pictures(values: dict) -> dict[str, bytes]:
    """Draws tokens per second against slots, a panel for each context, with the limits of bytes.

    Args:
      values: as in results.json.

    Returns:
      PNG files by name.
    """
    names = list(dict.fromkeys(row["name"] for row in values["rows"]))
    row_looks = looks(names, known_looks(values["configs"]))
    panels = []
    for number, context in enumerate(values["contexts"]):
        lines = []
        for name, look in row_looks.items():
            rows = [row for row in values["rows"] if (row["context"], row["name"]) == (number, name)]
            slots = [row["slots"] for row in rows]
            if rows[0]["many_seconds"] is None:
                lines.append(Line(name, look, slots, [row["fixed_tokens_per_s"] for row in rows]))
                continue
            limit = replace(look, dash=":", hollow=True)
            lines.append(Line(name, look, slots, [row["many_tokens_per_s"] for row in rows]))
            lines.append(Line(f"limit of {name}", limit, slots, [row["limit_tokens_per_s"] for row in rows]))
        x, y = Scale("slots", log=True, at_values=True), Scale("tokens per second", log=True)
        panels.append(Curves(lines, x, y, _told(context)))
    replies = values["replies"]
    notes = [
        f"n = {counted(len(replies), 'reply', 'replies')} of {min(replies)} to {max(replies)} tokens",
        "sequences come and go; verified decoding in fixed batches",
        "limits: weights and cache at the bandwidth of the same run",
        values["provenance"]["device"],
    ]
    title = f"{shortened(values['model'])} ({values['dtype']}): many prompts"
    return pictures("throughput", panels, title, notes)
