"""Full attention: every page, in every layer."""

from retro_jax.methods.base import Method

FULL = Method(name="full", title="full", help="every page")
