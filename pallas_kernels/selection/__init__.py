"""Which pages the newest query loads."""

from pallas_kernels.selection.api import select_pages
from pallas_kernels.selection.scores import SCORES

__all__ = ["SCORES", "select_pages"]
