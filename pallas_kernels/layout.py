"""How tokens lie in pages; the one definition for every backend."""

KEYS, VALUES = 0, 1
"""Index of keys and of values on the third axis from the end of `pages[..., 2, S, D]`."""


def pages_for(tokens: int, page_size: int) -> int:
    """The number of pages that hold `tokens` tokens."""
    return -(-tokens // page_size)
