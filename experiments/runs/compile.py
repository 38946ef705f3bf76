"""A run's programs compiled from shapes alone for its mesh: their memory by device, and what they exchange.

No weights are loaded and no cache is allocated. On simulated devices of a CPU, arguments, outputs and aliases
are those of any device; temporary memory is that of XLA's compiler for CPUs, and where kernels would run the
references do, which exchange as little.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from retro_jax import DecodeConfig, decode_step, extend, make_mesh
from retro_jax.experiments.io.models import known_model
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.tables import markdown
from retro_jax.experiments.machine.memory import gigabytes, memory
from retro_jax.experiments.machine.programs import release
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.runs.plan import Plan, check_fits
from retro_jax.sharding import abstract_arguments
from retro_jax.sizes import MIN_CHUNK, batch_rows, newcomer_rows, program_length

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")

_extend = jax.jit(extend, static_argnames=("model", "config"), donate_argnames="state")
_step = jax.jit(decode_step, static_argnames=("model", "config"), donate_argnames="state")


@dataclass(frozen=True)
class Program:
    """One compiled program of a run; bytes are those on each device.

    Attributes:
      method: the label of its configuration.
      name: "prefill" (a chunk of the prompts) or "decode" (one step).
      platform: that it was compiled for.
      arguments: bytes of weights, state and tokens.
      outputs: bytes of the new state and logits.
      aliased: bytes of the outputs that lie in arguments.
      temporary: bytes beside them.
      other_states: bytes of states that are held meanwhile, of sequences that come and go.
      collectives: how many of each kind there are.
    """

    method: str
    name: str
    platform: str
    arguments: int
    outputs: int
    aliased: int
    temporary: int
    other_states: int
    collectives: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes on each device while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.other_states


def compile_run(config: RunConfig, plan: Plan) -> list[Program]:
    """Compiles prefill and decode step of every method of a run for the mesh that it names.

    Raises:
      ValueError: the model's sizes are not known here, there are too few devices, or the mesh does not divide
        batch, heads or widths.
    """
    model = known_model(config.model, config.dtype)
    if model is None or plan.capacity is None:
        raise ValueError(
            f"the sizes of {config.model!r} are not known without fetching it; fetch it and name its folder"
        )
    devices = mesh_devices(config.data_devices * config.model_devices)
    mesh = make_mesh(config.data_devices, config.model_devices, devices)
    found, configs = [], config.configurations()
    decoded = batch_rows(config.batch, config.data_devices)
    read = newcomer_rows(config.batch, config.data_devices) if config.refills(plan.forced) else decoded

    def lowered(name: str, decode: DecodeConfig, rows: int) -> jax.stages.Lowered:
        params, state = abstract_arguments(model, decode, mesh, rows, plan.capacity)
        each = jax.ShapeDtypeStruct((rows,), jnp.int32)
        if name == "decode":
            return _step.lower(params, model, decode, state, each)
        chunk = program_length(plan.prompt_tokens, MIN_CHUNK, decode.prefill_chunk)
        tokens = jax.ShapeDtypeStruct((rows, chunk), jnp.int32)
        return _extend.lower(params, model, decode, state, tokens, each)

    with jax.set_mesh(mesh), Progress() as progress:
        for label, decode in configs.items():
            for name, rows in {"prefill": read, "decode": decoded}.items():
                own = memory(model, decode, rows, plan.capacity, config.data_devices, config.model_devices)
                others = plan.caches[label] - own.state
                compiled = lowered(name, decode, rows).compile()
                found.append(_program(label, name, devices[0].platform, compiled, others))
                progress("programs", len(found), 2 * len(configs))
            release()  # the next method's programs are other ones
    return found


def mesh_devices(count: int) -> Sequence[jax.Device]:
    """This host's devices where there are `count` of them, else simulated ones of its CPU.

    Devices can be simulated only before JAX has started: where it has, there may be too few.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.local_devices()
    return devices if len(devices) >= count else jax.local_devices(backend="cpu")


def programs_text(programs: Sequence[Program], config: RunConfig) -> str:
    """The programs as a table."""
    header = ["method", "program", "arguments", "new outputs", "temporary", "other states", "in all"]
    header.append("collectives")
    body = [
        [
            program.method,
            program.name,
            gigabytes(program.arguments),
            gigabytes(program.outputs - program.aliased),
            gigabytes(program.temporary),
            gigabytes(program.other_states),
            gigabytes(program.total),
            ", ".join(f"{count} {kind}" for kind, count in program.collectives.items()) or "none",
        ]
        for program in programs
    ]
    devices = config.data_devices * config.model_devices
    return f"compiled for {devices} x {programs[0].platform}, on each device:\n\n" + markdown(header, body)


def check_programs(programs: Sequence[Program], config: RunConfig) -> None:
    """Raises ValueError if one takes more than the devices have that the run is meant for."""
    largest = max(programs, key=lambda program: program.total)
    if config.device_gb:
        what = f"the program {largest.name!r} of {largest.method} takes"
        check_fits(what, largest.total, "--device-gb", config.device_gb * 1e9)


def _program(
    method: str, name: str, platform: str, compiled: jax.stages.Compiled, other_states: int
) -> Program:
    taken = compiled.memory_analysis()
    return Program(
        method=method,
        name=name,
        platform=platform,
        arguments=taken.argument_size_in_bytes,
        outputs=taken.output_size_in_bytes,
        aliased=taken.alias_size_in_bytes,
        temporary=taken.temp_size_in_bytes,
        other_states=other_states,
        collectives=dict(sorted(Counter(_CALL.findall(compiled.as_text())).items())),
    )
