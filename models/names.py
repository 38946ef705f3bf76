"""Suggestions for names that are not known."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """What to add to "NAME is unknown": " (did you mean 'quest'?)", or "" where no known name is near."""
    found = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.7)
    return f" (did you mean {found[0]!r}?)" if found else ""
