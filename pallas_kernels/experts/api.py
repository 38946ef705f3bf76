"""Public function of mixtures of experts."""

from collections.abc import Callable

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.experts import reference
from pallas_kernels.experts.gpu import kernels as mosaic_gpu


def mixture_of_experts(
    h: Float[Array, "R M"],
    router: Float[Array, "M E"],
    gate_up: Float[Array, "E M columns"],
    down: Float[Array, "E F M"],
    router_bias: Float[Array, " E"] | None,
    gate_up_bias: Float[Array, "E columns"] | None,
    down_bias: Float[Array, "E M"] | None,
    valid: Bool[Array, " R"],
    *,
    per_token: int,
    normalized: bool,
    parts: int,
    activation: Callable[[Array, Array], Array],
    implementation: str | None = None,
) -> tuple[Float[Array, "R M"], Int[Array, ""]]:
    """Sends each of few rows through the experts of its largest logits; adds their outputs up by its shares.

    A kernel reads only experts that a row chose, and each once, for all rows. What goes into down it rounds
    to the dtype of `h` after its product with a share, where the reference rounds before, and gate and up it
    does not round. Several devices need each to have its own part of every expert: call it in `shard_map`,
    and sum.

    Args:
      h: rows, normed.
      router: weights of the logits.
      gate_up: gate and up of every expert, joined in parts: columns of gate, then of up in each.
      down: weights of every expert.
      router_bias: of the logits; None: there is none.
      gate_up_bias: joined as `gate_up`; None: there is none.
      down_bias: None: there is none.
      valid: rows that count; the others choose no expert, and get zeros.
      per_token: experts of a row.
      normalized: whether shares are a softmax over the row's experts, or over all.
      parts: in which gate and up lie joined.
      activation: of gate and up, elementwise; hashable, since it is compiled in.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      The sums, float32, and how many experts are read.
    """
    return dispatch(
        "mixture_of_experts",
        implementation,
        {"xla": reference.mixture_of_experts, "mosaic_gpu": mosaic_gpu.mixture_of_experts},
        ((P(),) * 8, (P(), P())),
        h,
        router,
        gate_up,
        down,
        router_bias,
        gate_up_bias,
        down_bias,
        valid,
        per_token=per_token,
        normalized=normalized,
        parts=parts,
        activation=activation,
    )
