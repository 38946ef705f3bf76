"""Choosing the next token from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pallas_kernels.settings import under_fixed_settings
from retro_jax.fields import SamplingFields, check_seed, check_types


@dataclass(frozen=True)
class Sampling(SamplingFields):
    """How the next token is chosen. The default is greedy. Its fields are those of `SamplingFields`.

    Raises:
      ValueError: a field is out of its range.
      TypeError: a field is of another type than it says.
    """

    def __post_init__(self):
        check_types(self, SamplingFields)
        check_seed(seed=self.seed)
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature} is below 0; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} is below 1; None keeps every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; None keeps every token")


KEY_KIND = "threefry2x32"
"""Of random keys, whatever the process prefers: others draw differently in a batch of another size."""


@under_fixed_settings
def sequence_keys(sampling: Sampling, batch: int, first: int | Int[Array, ""] = 0) -> Key[Array, " B"]:
    """One random key per sequence, the same for a sequence's place whatever the size of the batch.

    Args:
      sampling: has the seed.
      batch: B, sequences.
      first: the place of the first of them.
    """
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(jax.random.key(sampling.seed, impl=KEY_KIND), first + jnp.arange(batch))


@under_fixed_settings
def sample(
    logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, " B"], positions: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each sequence; the draw depends on its key and on its position alone."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.top_p is not None:
        logits = _keep_top_p(logits, sampling.top_p)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _keep_top_p(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Logits with those outside the smallest set of probability `top_p` at -inf (arXiv 1904.09751)."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1) - jax.nn.softmax(descending, axis=-1)
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    lowest = jnp.take_along_axis(descending, jnp.maximum(kept - 1, 0), axis=-1)
    return jnp.where(logits < lowest, -jnp.inf, logits)
