"""Runs TPU kernels in the interpreter, which finds races and fills memory that nobody wrote with NaN."""

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def races_found(function, *args, interpret=INTERPRET, **kwargs):
    """What a kernel computes, and whether the interpreter found a race."""
    pltpu.reset_tpu_interpret_mode_state()
    result = jax.block_until_ready(function(*args, interpret=interpret, **kwargs))
    return result, interpret_pallas_call.races.races_found


def run(function, *args, **kwargs):
    """Runs a kernel in the interpreter; fails if it finds a race."""
    result, races = races_found(function, *args, **kwargs)
    assert not races
    return result
