"""Named configurations: Quest, the paper's method, and the best that was found at their memory traffic."""

import logging
from collections.abc import Mapping

PRESETS: Mapping[str, Mapping[str, object]] = {
    "quest": {"method": "quest", "sink_pages": 0},
    "paper": {"method": "retro", "sink_pages": 0},
    "mean-key": {
        "method": "quest",
        "sink_pages": 1,
        "score": "mean_key",
        "group_reduce": "mass",
        "budget_covers": "traffic",
        "statistics": "mean_key_int8",
    },
}
"""What each preset sets in `DecodeConfig`:

- "quest": Quest (arXiv 2406.10774), with one page set per KV head. Reads the budget's pages, and two vectors
  of every page of 16 tokens.
- "paper": RetroAttention (arXiv 2508.09001), with the same traffic.
- "mean-key": recommended. At no more traffic, one sink page, and pages of 16 tokens that are scored by 8-bit
  mean keys, in shares of attention; what its smaller statistics save is spent on pages. It does not revise
  past queries: whether a window pays depends on the model and on the text, and `method="retro", window=4`
  adds one. On Hopper GPUs and on TPUs all of it runs through kernels.

How accurate each is, on two models and two kinds of text, is among the results in the documentation.
"""

EARLIER_NAMES: Mapping[str, str] = {"retro": "mean-key"}
"""Names that presets had; what is called "mean-key" no longer revises, and does not gain by it."""


def preset_fields(name: str) -> Mapping[str, object]:
    """Returns what a preset sets in `DecodeConfig`; an earlier name is taken with a warning in the log.

    Args:
      name: in `PRESETS`, or an earlier name.

    Raises:
      ValueError: the name is unknown.
    """
    from retro_jax.models.names import nearest

    if name in EARLIER_NAMES:
        logging.getLogger(__name__).warning(
            "preset %r is %r now, which does not revise past queries; 'paper' is the paper's method",
            name,
            EARLIER_NAMES[name],
        )
    name = EARLIER_NAMES.get(name, name)
    if name not in PRESETS:
        raise ValueError(
            f"preset {name!r} is unknown{nearest(name, PRESETS)}; use one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]
