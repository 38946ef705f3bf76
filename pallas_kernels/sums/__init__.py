"""What a layer adds to the residual stream, and its norm: a sum of parts, on one device or over several.

Of several devices that share a model each writes its part into the memory of every other one, and adds up
what it has been sent: one launch, where a library's sum, the addition and the norm are five. The definitions
are plain `jnp`, and `lax.psum`.
"""

from pallas_kernels.sums.api import Mailbox, add_parts, add_sum, depth_splits, open_mailbox

__all__ = ["Mailbox", "add_parts", "add_sum", "depth_splits", "open_mailbox"]
