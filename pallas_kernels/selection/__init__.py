"""Which pages the newest query loads."""

from pallas_kernels.selection.api import choose_pages, select_pages
from pallas_kernels.selection.reference import page_scores

__all__ = ["choose_pages", "page_scores", "select_pages"]
