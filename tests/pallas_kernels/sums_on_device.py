"""Sums over devices against their definition, on Hopper GPUs, by hand:

    python -m tests.pallas_kernels.sums_on_device

With several GPUs each sends to all others, one of them late; with one GPU it stands for several. Exits with 1
if a sum differs from its definition or between devices.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import retro_jax as rj
from pallas_kernels import Mailbox, add_sum, open_mailbox
from pallas_kernels.dispatch import HEADS
from pallas_kernels.sums.api import BY_DEVICE
from pallas_kernels.sums.gpu import kernels
from retro_jax.models.transformer import rms_norm

DTYPE, EPS, ROUNDS, TIMED = "bfloat16", 1e-5, 100, 1000
TOLERANCE = 0.01
"""Relative: XLA rounds to bfloat16 in other places."""
CASES = [(2, 4, 4096), (4, 1, 1024), (8, 32, 8192), (2, 32, 8192), (4, 4, 4096)]
"""Devices, rows, columns; one GPU stands for several in the first three."""


def part_of(number, device, shape):
    """What a device adds in a sum: other numbers each time, some of them -0.0."""
    x = lax.iota(jnp.uint32, shape[0] * shape[1])
    x = (x + jnp.uint32(7919) * number.astype(jnp.uint32)) * jnp.uint32(2654435761)
    x = (x ^ (x >> 15) ^ device.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)) * jnp.uint32(0x2C1B3C6D)
    x = (x ^ (x >> 12)).astype(jnp.float32) * 2.0**-31 - 1
    return jnp.where(jnp.abs(x) < 0.1, -0.0, x).reshape(shape).astype(DTYPE)


def split(parts):
    """What each device adds as the sum of two, float32, with a row more that is not read."""
    both = jnp.stack([parts.astype(jnp.float32) * 0.75, parts.astype(jnp.float32) * 0.25], axis=1)
    return jnp.pad(both, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=jnp.nan)


def by_rounds(send, rows, width, late=lambda number: 0):
    """Two sums a round, of which the first is normed; all results, [rounds, 2, 2, devices, R, M]."""

    def body(x, index):
        found = []
        for turn in range(2):
            new, normed = send(x, 2 * index + turn, turn)
            found.append(jnp.stack([new, normed]))
            x = new[0] * jnp.asarray(0.5, DTYPE) + late(2 * index + turn).astype(DTYPE)
        return x, jnp.stack(found)

    return lax.scan(body, jnp.zeros((rows, width), DTYPE), jnp.arange(ROUNDS))[1]


def defined(devices, rows, width, norm):
    def send(x, number, turn):
        parts = jax.vmap(lambda device: part_of(number, device, x.shape))(jnp.arange(devices))
        new = (x.astype(jnp.float32) + parts.astype(jnp.float32).sum(0)).astype(DTYPE)
        normed = rms_norm(new, norm, EPS) if turn == 0 else new
        return new[None], normed[None]

    return by_rounds(send, rows, width, lambda number: jnp.zeros(()))


def on_one(devices, rows, width, norm):
    cells, addresses = kernels.open_cells(rows, width, jnp.dtype(DTYPE), devices, here=devices)
    cells, sender = jax.new_ref(cells), jnp.arange(devices)

    def send(x, number, turn):
        parts = jax.vmap(lambda device: part_of(number, device, x.shape))(sender)
        weight = norm if turn == 0 else None
        return kernels.add_sum(x, split(parts), weight, cells, addresses, sender, eps=EPS, turn=turn)

    return by_rounds(send, rows, width, lambda number: jnp.zeros(()))


def on_several(rows, width, norm):
    mailbox = open_mailbox(rows, width, DTYPE)
    assert mailbox is not None, "these GPUs do not reach each other's memory"

    def local(norm, mailbox):
        me = lax.axis_index(HEADS)

        def late(number):
            many = jnp.where(me == number // 3 % lax.axis_size(HEADS), 20, 0)
            busy = lax.fori_loop(0, many, lambda _, x: jnp.tanh(x @ x), jnp.ones((512, 512)))
            return busy[0, 0] * 0

        def send(x, number, turn):
            (parts,) = split(part_of(number, me, x.shape)[None])
            found = add_sum(x, parts, norm if turn == 0 else None, mailbox, eps=EPS, turn=turn)
            return found[0][None], found[1][None]

        return by_rounds(send, rows, width, late)

    specs = P(), Mailbox(BY_DEVICE, BY_DEVICE)
    spread = jax.shard_map(local, in_specs=specs, out_specs=P(None, None, None, HEADS), check_vma=False)
    return spread(norm, mailbox)


def microseconds(rows, width, norm):
    """Of one sum, in a scan of many."""
    mailbox = open_mailbox(rows, width, DTYPE)

    def local(norm, mailbox):
        def body(x, _):
            for turn in (0, 1) * 8:
                x = add_sum(x, x[None], norm, mailbox, eps=EPS, turn=turn)[1]
            return x, None

        return lax.scan(body, jnp.ones((rows, width), DTYPE), length=TIMED // 16)[0]

    specs = P(), Mailbox(BY_DEVICE, BY_DEVICE)
    return jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(norm, mailbox)


def check(devices, rows, width):
    """Prints what was found; returns whether it is right."""
    norm, took = jnp.linspace(0.5, 2, width).astype(DTYPE), ""
    several = jax.device_count() > 1
    mesh = rj.make_mesh(1, devices if several else 1)
    options = rj.compiler_options(mesh)
    expected = np.asarray(jax.jit(lambda: defined(devices, rows, width, norm))(), np.float64)
    with jax.set_mesh(mesh):
        if several:
            run = jax.jit(lambda: on_several(rows, width, norm), compiler_options=options)
        else:
            run = jax.jit(lambda: on_one(devices, rows, width, norm))
        found = np.asarray(run(), np.float64)
        if several:
            timed = jax.jit(lambda: microseconds(rows, width, norm), compiler_options=options)
            timed().block_until_ready()
            start = time.perf_counter()
            timed().block_until_ready()
            took = f", {(time.perf_counter() - start) / (TIMED // 16 * 16) * 1e6:.1f} us each"
    same = bool((found == found[:, :, :, :1]).all())
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    passed = same and error < TOLERANCE
    result = f"{'ok  ' if passed else 'FAIL'} {error:.1e}"
    print(f"{result} {devices} devices, {rows} rows of {width}, the same on all: {same}{took}", flush=True)
    return passed


def main():
    count = jax.device_count()
    cases = CASES[:3] if count == 1 else [case for case in CASES if case[0] <= count]
    sys.exit(not all([check(*case) for case in cases]))


if __name__ == "__main__":
    main()
