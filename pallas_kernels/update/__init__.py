"""Writing keys and values into pages."""

from pallas_kernels.update.api import refresh_statistics, update_from_product, update_pages

__all__ = ["refresh_statistics", "update_from_product", "update_pages"]
