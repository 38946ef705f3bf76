"""What follows attention in a layer: its projection and the MLP, on one device or on several.

Of several GPUs whose memory reaches each other, each adds up by itself what all of them add to the residual
stream (`pallas_kernels.sums`). Otherwise that is left to XLA.

What experts do is not left to XLA to partition among devices: it would sum over them for one expert after
another. Each device has a part of every expert, and the tokens of its own sequences; one sum is left.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from pallas_kernels import Mailbox, add_sum, mixture_of_experts, open_mailbox
from pallas_kernels.dispatch import HEADS, SEQUENCES, traced_for
from pallas_kernels.sums.api import BY_DEVICE
from retro_jax.config import DecodeConfig
from retro_jax.models import transformer
from retro_jax.models.config import Experts, ModelConfig
from retro_jax.models.experts import ExpertParams, FewTokens, apply_experts
from retro_jax.models.transformer import LayerParams


def after_attention(
    layer: LayerParams,
    model: ModelConfig,
    x: Float[Array, "B T M"],
    o: Float[Array, "B T N D"],
    valid: Bool[Array, "B T"],
    implementation: str | None,
    mailbox: Mailbox | None = None,
) -> tuple[Float[Array, "B T M"], Float[Array, " B"] | None]:
    """The residual stream with what attention and then the MLP add to it, and what `mlp` says of experts.

    Args:
      layer: weights.
      model: sizes.
      x: the residual stream.
      o: attention outputs.
      valid: tokens that count.
      implementation: of products with chosen experts, see `mlp`.
      mailbox: for sums over devices; None: XLA's.
    """
    if mailbox is not None and _is_plain(layer, model):
        return _with_sums(layer, model, x, o, mailbox), None
    x = transformer.attention_output(layer, model, x, o)
    return mlp(layer, model, x, valid, implementation)


def step_mailbox(model: ModelConfig, config: DecodeConfig, batch: int) -> Mailbox | None:
    """A mailbox for the sums of one decode step on the mesh that is set; None where they are XLA's."""
    mesh = jax.sharding.get_abstract_mesh()
    if config.implementation == "xla" or batch % mesh.shape.get(SEQUENCES, 1):
        return None
    rows = batch // mesh.shape.get(SEQUENCES, 1) * config.slots
    return open_mailbox(rows, model.width, model.dtype)


def _is_plain(layer: LayerParams, model: ModelConfig) -> bool:
    """Whether a layer adds two products to the residual stream, and nothing is done with them before."""
    parts = layer.experts, layer.bo, layer.attn_post_norm, layer.mlp_post_norm
    return layer.mlp_norm is not None and parts == (None,) * 4 and model.residual_multiplier == 1


@jax.named_scope("after_attention")
def _with_sums(
    layer: LayerParams,
    model: ModelConfig,
    x: Float[Array, "B T M"],
    o: Float[Array, "B T N D"],
    mailbox: Mailbox | None,
) -> Float[Array, "B T M"]:
    """What `after_attention` does for a plain layer, each device with its own part of every matrix."""
    parts = model.parts // jax.sharding.get_abstract_mesh().shape[HEADS]
    rows = (-1, model.width)

    def local(x, o, wo, norm, w_gate_up, w_down, mailbox):
        branch = transformer.product(o.astype(x.dtype).reshape(*x.shape[:2], -1), wo)
        turns = functools.partial(add_sum, mailbox=mailbox, eps=model.norm_eps)
        new, h = turns(x.reshape(rows), branch.reshape(rows), norm, turn=0)
        branch = transformer.gated_mlp(w_gate_up, w_down, model, parts, h.reshape(x.shape))
        return turns(new, branch.reshape(rows), None, turn=1)[0].reshape(x.shape)

    fields = "wo", "mlp_norm", "w_gate_up", "w_down"
    by_sequence = P(SEQUENCES)
    return jax.shard_map(
        local,
        in_specs=(
            by_sequence,
            P(SEQUENCES, None, HEADS),
            *(_spread(LayerParams, field) for field in fields),
            None if mailbox is None else Mailbox(BY_DEVICE, BY_DEVICE),
        ),
        out_specs=by_sequence,
        check_vma=False,
    )(x, o, *(getattr(layer, field) for field in fields), mailbox)


def mlp(
    layer: LayerParams,
    model: ModelConfig,
    x: Float[Array, "B T M"],
    valid: Bool[Array, "B T"],
    implementation: str | None,
) -> tuple[Float[Array, "B T M"], Float[Array, " B"] | None]:
    """`transformer.counted_mlp` on the devices of the mesh that is set.

    `implementation` is that of experts of few tokens on a GPU, which in a loop would wait for the host to
    learn of its end; "xla" is that loop, since XLA would copy the chosen experts.
    """
    few = None
    if implementation != "xla" and traced_for().platform == "gpu":
        few = functools.partial(mixture_of_experts, implementation=implementation)
    return transformer.counted_mlp(layer, model, x, valid, functools.partial(_on_mesh, few))


def _on_mesh(
    few: FewTokens | None,
    params: ExpertParams,
    experts: Experts,
    parts: int,
    h: Float[Array, "B T M"],
    valid: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T M"], Float[Array, " B"]]:
    mesh = jax.sharding.get_abstract_mesh()
    ours = {SEQUENCES, HEADS} == {*mesh.axis_names} and {*mesh.axis_types} == {AxisType.Auto}
    if mesh.size == 1 or not ours:
        return apply_experts(params, experts, parts, h, valid, few)

    def local(params, h, valid):
        if params.down_bias is not None:  # once in the sum over devices
            first = lax.axis_index(HEADS) == 0
            params = params.replace(down_bias=jnp.where(first, params.down_bias, 0))
        out, read = apply_experts(params, experts, parts // mesh.shape[HEADS], h, valid, few)
        return lax.psum(out, HEADS), read

    by_sequence = P(SEQUENCES)
    weights = jax.tree_util.tree_map_with_path(lambda path, _: _spread(ExpertParams, path[0].name), params)
    return jax.shard_map(
        local,
        in_specs=(weights, by_sequence, by_sequence),
        out_specs=(by_sequence, by_sequence),
        check_vma=False,
    )(params, h, valid)


def _spread(weights: type, field: str) -> P:
    """How a weight is spread, as its field says."""
    axis = weights.__dataclass_fields__[field].metadata["divided"]
    return P() if axis is None else P(*[None] * axis, HEADS)
