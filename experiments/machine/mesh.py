"""The devices that a command's flags name: of this process, or of all that were started together."""

import os
import sys

import jax

from retro_jax import make_mesh
from retro_jax.experiments.machine.devices import local_devices


def join_processes() -> None:
    """Joins the processes that run the same command; before anything else asks for a device.

    From then on stdout has what Python prints alone.

    Raises:
      ValueError: nothing tells which they are, or they do not answer.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--distributed finds no other processes: {' '.join(str(error).split())}; start the command by "
            "srun or mpirun, or on every host of a TPU slice, or leave --distributed out"
        ) from error
    _keep_stdout()


def _keep_stdout() -> None:
    """Sends to stderr what libraries print to stdout: CPU devices tell there whom they are connected to."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115, PTH123


def mesh_of_flags(data: int, model: int, *, distributed: bool) -> jax.sharding.Mesh | None:
    """The mesh that --data-devices and --model-devices name; None for one device of one process.

    Starts JAX where it has not started, and joins the other processes first where there are some.

    Args:
      data: devices over which sequences are spread.
      model: devices over which KV heads and weights are spread.
      distributed: whether the devices are those of all processes.

    Raises:
      ValueError: there are not so many devices, or some of a process would be left out; see also
        `join_processes` and `local_devices`.
    """
    if data < 1 or model < 1:
        raise ValueError(f"--data-devices {data} and --model-devices {model} must be 1 or more")
    if distributed:
        join_processes()
    local_devices()
    asked, there, processes = data * model, jax.device_count(), jax.process_count()
    if asked > there or (processes > 1 and asked != there):
        where = f"the {processes} processes have" if processes > 1 else "this process has"
        raise ValueError(
            f"--data-devices {data} and --model-devices {model} ask for {asked} devices, {where} {there}; "
            f"choose two numbers whose product is {'' if processes > 1 else 'at most '}{there}"
        )
    return None if asked == 1 else make_mesh(data, model)
