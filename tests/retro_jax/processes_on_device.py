"""Processes with a device each against one process, on a host with several GPUs, by hand:

    python -m tests.retro_jax.processes_on_device 2 4

For each of the numbers as many processes share a mesh. Exits with 1 if they do not all get the same tokens
and log-likelihoods, or other log-likelihoods than one process with one device beyond a few roundings.
"""

import argparse
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import retro_jax as rj
from retro_jax.models import ModelConfig, random_params

MODEL = ModelConfig(
    name="processes",
    vocab_size=4096,
    num_layers=4,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    width=1024,
    hidden_width=2048,
    max_positions=1024,
    dtype="bfloat16",
)
CONFIG = rj.DecodeConfig("retro", window=4, budget_tokens=256)
PROMPT, NEW, SCORED = 600, 24, 64
TOLERANCE = 0.01
"""Nats of the mean over the scored tokens."""


def weights():
    """The same in all processes to the last bit, however they compile."""
    rng = np.random.default_rng(1)

    def drawn(weight):
        if len(weight.shape) == 1:
            return jnp.ones(weight.shape, weight.dtype)  # of norms
        numbers = rng.standard_normal(weight.shape, np.float32) * weight.shape[0] ** -0.5
        return jnp.asarray(numbers, weight.dtype)

    return jax.tree.map(drawn, jax.eval_shape(lambda: random_params(MODEL, jax.random.key(0))))


def results() -> dict:
    """What a process gets, whose weights are spread over all devices if there are several."""
    params, devices = weights(), jax.device_count()
    if devices > 1:
        params = rj.shard_params(params, MODEL, rj.make_mesh(1, devices))
    model = rj.Model(MODEL, params, None)
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, PROMPT + SCORED))
    tokens = rj.generate(model, list(ids[:, :PROMPT]), CONFIG, NEW).tokens
    return {"tokens": tokens, "nll": rj.score(model, ids, CONFIG, PROMPT).nll.tolist()}


def started(count: int) -> list[dict]:
    """The results of so many processes, each of which sees one device."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.retro_jax.processes_on_device", "--join", port, str(count)]
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(rank), "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", type=int, nargs="*", default=[2], help="of processes")
    parser.add_argument("--join", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.join:
        port, count, rank = flags.join
        if count != "1":
            jax.distributed.initialize(f"localhost:{port}", int(count), int(rank))
        print(json.dumps(results()))
        return
    (alone,) = started(1)
    failed = 0
    for count in flags.counts:
        first, *others = started(count)
        same = all(other == first for other in others)
        apart = abs(np.mean(first["nll"]) - np.mean(alone["nll"]))
        passed = same and apart < TOLERANCE
        failed += not passed
        alike = np.mean(np.array(first["tokens"]) == np.array(alone["tokens"]))
        print(
            f"{'ok  ' if passed else 'FAIL'} {count} processes: all the same: {same}; beside one process "
            f"{apart:.1e} nats a token apart, {alike:.0%} of generated tokens the same",
            flush=True,
        )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
