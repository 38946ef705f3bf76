"""Which pages the newest query loads."""

from pallas_kernels.selection.api import choose_pages, page_scores, select_pages

__all__ = ["choose_pages", "page_scores", "select_pages"]
