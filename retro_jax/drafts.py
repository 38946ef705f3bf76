"""How many tokens verified decoding drafts, and what became of them.

Where a draft is accepted with probability r if those before it were, a round of m drafts and their check
yields 1 + r + ... + r^m tokens in the mean. It reads what m sparse steps and one dense pass read. Of m = 1 up
to the bound, the one is taken that gives the most tokens per byte over all sequences of the batch, by the
acceptance and the bytes of the rounds so far. One is always drafted: else nothing more would be learnt of r.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retro_jax.models.config import ModelConfig
from retro_jax.models.experts import expert_bytes, experts_read
from retro_jax.models.transformer import Params
from retro_jax.sharding import to_host

MEMORY = 0.9
"""What a round still counts for in the next one: texts change, and acceptance with them."""
PRIOR = 4.0, 5.0
"""Drafts accepted and tried before the first round."""


@flax.struct.dataclass
class RoundMetrics:
    """What one round of verified decoding did, per sequence; zeros for a sequence that was not active.

    Attributes:
      drafted: tokens drafted.
      accepted: how many of them, from the first on, full attention chooses too.
      emitted: tokens that the round yielded: those accepted and one of full attention's own, or fewer where
        a stop token is among them.
      draft_bytes: of keys, values and page statistics that the drafts read, over all layers and KV heads.
      check_bytes: of keys and values that the dense pass read.
    """

    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]
    emitted: Int[Array, " B"]
    draft_bytes: Float[Array, " B"]
    check_bytes: Float[Array, " B"]


@flax.struct.dataclass
class Acceptance:
    """What is known of the rounds so far, per sequence, the latest counting most.

    Attributes:
      accepted: drafts accepted.
      tried: drafts compared: those accepted, and the first that was not.
      step_bytes: what the latest draft step read; 0 before the first.
      check_bytes: what the latest dense pass read, likewise.
    """

    accepted: Float[Array, " B"]
    tried: Float[Array, " B"]
    step_bytes: Float[Array, " B"]
    check_bytes: Float[Array, " B"]

    @classmethod
    def unknown(cls, batch: int) -> "Acceptance":
        """Before the first round, which drafts as many as it may."""
        return cls(*(jnp.zeros(batch, jnp.float32) for _ in range(4)))

    def after(self, metrics: RoundMetrics) -> "Acceptance":
        """With what another round has shown; a sequence that it did not draft for keeps what it had."""
        drew = metrics.drafted > 0
        missed = metrics.accepted < metrics.drafted
        steps = jnp.maximum(metrics.drafted, 1)
        return Acceptance(
            accepted=jnp.where(drew, MEMORY * self.accepted + metrics.accepted, self.accepted),
            tried=jnp.where(drew, MEMORY * self.tried + metrics.accepted + missed, self.tried),
            step_bytes=jnp.where(drew, metrics.draft_bytes / steps, self.step_bytes),
            check_bytes=jnp.where(drew, metrics.check_bytes, self.check_bytes),
        )

    def best_drafts(
        self, k: int, active: Bool[Array, " B"], weights: Sequence[int | float]
    ) -> Int[Array, ""]:
        """How many tokens to draft for each of the active sequences, 1..k; see the module.

        Args:
          k: the bound; static.
          active: sequences that will go on.
          weights: bytes that a pass over 1, 2, ..., k + 1 tokens of each sequence reads of the model, once
            for the batch.
        """
        rate = (PRIOR[0] + self.accepted) / (PRIOR[1] + self.tried)
        reached = rate[:, None] ** jnp.arange(k + 1)  # a token after i drafts
        tokens = jnp.sum(jnp.where(active[:, None], jnp.cumsum(reached, axis=1), 0.0), axis=0)[1:]
        step, check = (jnp.sum(jnp.where(active, read, 0.0)) for read in (self.step_bytes, self.check_bytes))
        of_step, *of_checks = weights
        cost = jnp.asarray(of_checks, jnp.float32) + check + jnp.arange(1, k + 1) * (of_step + step)
        # Before anything is known of the costs, the more the better.
        return jnp.where(check > 0, jnp.argmax(tokens / cost) + 1, k).astype(jnp.int32)


def weight_bytes(params: Params, model: ModelConfig, tokens: int | float) -> int | float:
    """Bytes that a pass reads of the weights; of an embedding that is no output head, next to nothing.

    Args:
      params: weights, or their shapes.
      model: their sizes.
      tokens: of the pass, which choose experts: each is taken to be chosen as often. What a step has read of
        them, its metrics tell; 0 leaves them out.
    """
    read = params if params.head is None else params.replace(embed=None)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(read))
    if model.experts is None:
        return whole
    layers = sum(kind.mlp == "experts" for kind in model.layers)
    unread = model.experts.count - experts_read(model.experts, tokens)
    return whole - layers * unread * expert_bytes(model)


@dataclass(frozen=True)
class VerifiedMetrics:
    """Metrics of a run of verified decoding, gathered on the host: see `RoundMetrics`.

    Attributes:
      drafted: [rounds, B].
      accepted: [rounds, B].
      emitted: [rounds, B]; 0 where the sequence was not active.
      draft_bytes: [rounds, B].
      check_bytes: [rounds, B].
    """

    drafted: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray
    draft_bytes: np.ndarray
    check_bytes: np.ndarray

    @classmethod
    def gather(cls, calls: Sequence[RoundMetrics]) -> "VerifiedMetrics":
        """From the stacked metrics of consecutive calls.

        Raises:
          ValueError: there are none.
        """
        if not calls:
            raise ValueError("no rounds of verified decoding were taken, so there is nothing to measure")
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *to_host(calls))
        return cls(*(getattr(joined, name) for name in cls.__dataclass_fields__))

    def of(self, sequences: slice) -> "VerifiedMetrics":
        """Those of some of the sequences."""
        return VerifiedMetrics(*(getattr(self, name)[:, sequences] for name in self.__dataclass_fields__))

    def acceptance(self) -> np.ndarray:
        """Share of the drafts at each position, the first to the last, that were accepted: [most drafts].

        A draft behind one that was not accepted is not either.
        """
        position = np.arange(1, self.drafted.max(initial=0) + 1)[:, None, None]
        return np.sum(self.accepted >= position, axis=(1, 2)) / np.sum(self.drafted >= position, axis=(1, 2))

    def summary(self) -> dict[str, object]:
        """Plain numbers: dense passes per sequence in all, tokens and KV bytes of one, and of a token."""
        checks = int((self.emitted > 0).sum())
        tokens, drafting, checking = (
            float(array.sum()) for array in (self.emitted, self.draft_bytes, self.check_bytes)
        )
        return {
            "checks": checks,
            "drafts_per_check": float(self.drafted.sum()) / max(checks, 1),
            "tokens_per_check": tokens / max(checks, 1),
            "draft_bytes_per_check": drafting / max(checks, 1),
            "check_bytes_per_check": checking / max(checks, 1),
            "kv_bytes": (drafting + checking) / max(tokens, 1),
            "acceptance": [float(share) for share in self.acceptance()],
        }
