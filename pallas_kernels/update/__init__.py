"""Writing keys and values into pages."""

from pallas_kernels.update.api import update_pages

__all__ = ["update_pages"]
