"""Named configurations: Quest, the paper's method, and the best that was found at their memory traffic."""

from collections.abc import Mapping

PRESETS: Mapping[str, Mapping[str, object]] = {
    "quest": {"method": "quest", "sink_pages": 0},
    "paper": {"method": "retro", "sink_pages": 0},
    "retro": {
        "method": "retro",
        "page_size": 8,
        "score": "mean_key",
        "statistics": "mean_key_int8",
        "group_reduce": "mass",
        "budget_covers": "traffic",
        "residual_pages": 8,
    },
}
"""What each preset sets in `DecodeConfig`:

- "quest": Quest (arXiv 2406.10774), with one page set per KV head. Reads the budget's pages, and two vectors
  of every page of 16 tokens.
- "paper": RetroAttention (arXiv 2508.09001), with the same traffic.
- "retro": at no more traffic, pages of 8 tokens that are scored by 8-bit mean keys, in shares of attention;
  one sink page; pages that are not loaded count by their mean keys and the mean value of 64 tokens. What its
  statistics save is spent on pages. Its selection and its residual run through XLA everywhere, and so does
  all else on pages of 8 tokens; with `page_size=16` attention and updates of pages run through kernels
  (docs/kernels.md).

How accurate each is: docs/results.
"""
