"""The real TPU compiler, on a machine without a TPU.

Needs the package libtpu of JAX for TPUs (`pip install 'jax[tpu]'`) on the path; the tests have it there by
`make test`.
"""

import os
from importlib.util import find_spec

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
"""The smallest of each chip in `pallas_kernels.tpu.CHIPS`."""


def without_a_tpu() -> None:
    """Keeps the compiler from looking for TPUs; call it before JAX is imported."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # tests run in several processes
    }.items():
        os.environ.setdefault(name, value)


def installed() -> bool:
    """Whether the compiler is there."""
    return find_spec("libtpu") is not None


def compile_for(chip, function, *shapes, donate=(), row_major=False):
    """What `function` of arrays of these shapes becomes for one device of a chip, by name.

    Unless they are to be `row_major`, arrays lie in memory as JAX lays them out by default.
    """
    import jax
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

    from retro_jax.experiments.machine.programs import not_cached

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    device = topology.devices[0]
    sharding = SingleDeviceSharding(device)

    def on_device(x):
        place = Format(Layout(tuple(range(x.ndim))), sharding) if row_major else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    with use_abstract_mesh(Mesh([device], ("device",)).abstract_mesh), not_cached():
        return jax.jit(function, donate_argnums=donate).lower(*jax.tree.map(on_device, shapes)).compile()


def compile_step(chip, devices, model, config, batch=1, capacity=32768):
    """What a decode step becomes, its cache donated, with KV heads spread over `devices` devices of a chip.

    Args:
      chip: name in `TOPOLOGIES`.
      devices: how many; at most those of the topology.
      model: a `ModelConfig`.
      config: a `DecodeConfig`.
      batch: sequences.
      capacity: tokens that the cache has room for.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

    from pallas_kernels.dispatch import HEADS, SEQUENCES
    from retro_jax import decode_step
    from retro_jax.experiments.machine.programs import not_cached
    from retro_jax.sharding import abstract_arguments

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    # In the order of the topology: make_mesh would want whole chips, of which a v4 has two cores.
    mesh = Mesh([topology.devices[:devices]], (SEQUENCES, HEADS), axis_types=(AxisType.Auto,) * 2)
    params, state = abstract_arguments(model, config, mesh, batch, capacity)
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(SEQUENCES)))
    step = jax.jit(decode_step, static_argnums=(1, 2), donate_argnums=3)
    with use_abstract_mesh(mesh.abstract_mesh), not_cached():
        return step.lower(params, model, config, state, tokens).compile()
