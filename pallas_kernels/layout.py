"""How tokens lie in pages; the one definition for every backend."""

KEYS = 0
"""Index of keys on the third axis from the end of `pages[..., 2, S, D]`."""
VALUES = 1
"""Index of values there."""


def pages_for(tokens: int, page_size: int) -> int:
    """The number of pages that hold `tokens` tokens."""
    return -(-tokens // page_size)
