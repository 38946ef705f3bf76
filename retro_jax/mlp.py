"""The MLP of a layer in a pass over tokens of which some do not count, on one device or on several.

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

from pallas_kernels import mixture_of_experts
from pallas_kernels.dispatch import HEADS, SEQUENCES, traced_for
from retro_jax.models import transformer
from retro_jax.models.config import Experts, ModelConfig
from retro_jax.models.experts import ExpertParams, FewTokens, apply_experts
from retro_jax.models.transformer import LayerParams


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
    weights = jax.tree_util.tree_map_with_path(_spec, params)
    return jax.shard_map(
        local,
        in_specs=(weights, by_sequence, by_sequence),
        out_specs=(by_sequence, by_sequence),
        check_vma=False,
    )(params, h, valid)


def _spec(path: tuple, _: Array) -> P:
    """How a weight of the experts is spread, as its field says."""
    axis = ExpertParams.__dataclass_fields__[path[0].name].metadata["divided"]
    return P() if axis is None else P(*[None] * axis, HEADS)
