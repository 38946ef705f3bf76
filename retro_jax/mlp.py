"""What follows attention in a layer: its projection and the MLP, on one device or on several.

On Hopper GPUs products with few rows leave their sums over the depth to the kernel that adds them to the
residual stream.

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

from pallas_kernels import Mailbox, add_sum, depth_splits, mixture_of_experts, open_mailbox
from pallas_kernels.dispatch import HEADS, SEQUENCES, traced_for
from pallas_kernels.sums.api import BY_DEVICE
from retro_jax.config import DecodeConfig
from retro_jax.models import transformer
from retro_jax.models.config import Experts, ModelConfig
from retro_jax.models.experts import ExpertParams, FewTokens, apply_experts
from retro_jax.models.transformer import LayerParams
from retro_jax.stream import Norm, Stream, add


def after_attention(
    layer: LayerParams,
    model: ModelConfig,
    stream: Stream,
    o: Float[Array, "B T N D"],
    valid: Bool[Array, "B T"],
    norm: Norm,
    implementation: str | None,
    mailbox: Mailbox | None = None,
) -> tuple[Stream, Float[Array, " B"] | None]:
    """The residual stream with what attention and then the MLP add to it, and what `mlp` says of experts.

    Args:
      layer: weights.
      model: sizes.
      stream: the residual stream.
      o: attention outputs.
      valid: tokens that count.
      norm: of what comes behind the layer.
      implementation: of the additions, and of products with chosen experts, see `mlp`.
      mailbox: for sums over devices; None: XLA's.
    """
    o = o.astype(stream.x.dtype)
    if mailbox is not None and _is_plain(layer, model):
        return _with_sums(layer, model, stream.x, o, norm, implementation, mailbox), None
    parts = transformer.attention_parts(layer, o, _splits(o, layer.wo, implementation))
    stream = add(stream, parts, layer.attn_post_norm, layer.mlp_norm, model, implementation)
    parts, experts = mlp(layer, model, stream.h, valid, implementation)
    return add(stream, parts, layer.mlp_post_norm, norm, model, implementation), experts


def _splits(x: Float[Array, "B T *width"], w: Float[Array, "width M"], implementation: str | None) -> int:
    """Parts of the product of few tokens with a matrix."""
    return depth_splits(x.shape[0] * x.shape[1], w.shape[0], w.dtype, implementation)


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
    norm: Norm,
    implementation: str | None,
    mailbox: Mailbox | None,
) -> Stream:
    """What `after_attention` does for a plain layer, each device with its own part of every matrix."""
    parts = model.parts // jax.sharding.get_abstract_mesh().shape[HEADS]

    def local(x, o, wo, mlp_norm, w_gate_up, w_down, norm, mailbox):
        def added(x, inner, w, norm, turn):
            own = transformer.split_product(inner, w, _splits(inner, w, implementation))
            own = own.reshape(len(own), -1, model.width)
            sums = add_sum(x.reshape(-1, model.width), own, norm, mailbox, eps=model.norm_eps, turn=turn)
            return Stream(*(each.reshape(x.shape) for each in sums))

        stream = added(x, o.reshape(*x.shape[:2], -1), wo, mlp_norm, turn=0)
        inner = transformer.gated(w_gate_up, model, parts, stream.h)
        return added(stream.x, inner, w_down, norm, turn=1)

    fields = "wo", "mlp_norm", "w_gate_up", "w_down"
    by_sequence = P(SEQUENCES)
    return jax.shard_map(
        local,
        in_specs=(
            by_sequence,
            P(SEQUENCES, None, HEADS),
            *(_spread(LayerParams, field) for field in fields),
            P(),
            None if mailbox is None else Mailbox(BY_DEVICE, BY_DEVICE),
        ),
        out_specs=by_sequence,
        check_vma=False,
    )(x, o, *(getattr(layer, field) for field in fields), norm, mailbox)


def mlp(
    layer: LayerParams,
    model: ModelConfig,
    h: Float[Array, "B T M"],
    valid: Bool[Array, "B T"],
    implementation: str | None,
) -> tuple[Float[Array, "S B rows M"], Float[Array, " B"] | None]:
    """`transformer.mlp_parts` on the devices of the mesh that is set.

    `implementation` is that of experts of few tokens on a GPU, which in a loop would wait for the host to
    learn of its end; "xla" is that loop, since XLA would copy the chosen experts.
    """
    few = None
    if implementation != "xla" and traced_for().platform == "gpu":
        few = functools.partial(mixture_of_experts, implementation=implementation)
    splits = 1 if layer.experts else _splits(h, layer.w_down, implementation)
    return transformer.mlp_parts(layer, model, h, valid, functools.partial(_on_mesh, few), splits)


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
        return lax.psum(out.astype(h.dtype), HEADS), read

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
