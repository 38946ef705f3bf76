"""Two processes that share a mesh: `generate` and `score` give each of them what one process gets."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from tests.retro_jax.tiny import tiny

CONFIG = rj.DecodeConfig("retro", window=3, page_size=8, budget_tokens=24, dense_layers=1, prefill_chunk=16)


def same_weights() -> rj.Model:
    """A model whose weights are the same to the last bit however a process compiles."""
    model, rng = tiny(3, layers=2), np.random.default_rng(1)

    def drawn(weight):
        if weight.ndim == 1:
            return weight  # of norms: ones
        return jnp.asarray(rng.normal(size=weight.shape) * weight.shape[0] ** -0.5, weight.dtype)

    return replace(model, params=jax.tree.map(drawn, model.params))


def results(mesh: jax.sharding.Mesh | None, folder: Path) -> dict:
    """What a process computes; its weights on the mesh, if there is one.

    Args:
      mesh: None for one process alone.
      folder: where it leaves a state, for others to go on from.
    """
    model = same_weights()
    if mesh is not None:
        model = replace(model, params=rj.shard_params(model.params, model.config, mesh))
    ids = np.random.default_rng(0).integers(0, 96, (2, 30))
    sampling = rj.Sampling(1.0)
    first = rj.generate(model, list(ids[:, :20]), CONFIG, 5, sampling=sampling, capacity=64)
    rj.save_state(model, first, folder)
    second = rj.generate(model, [None, [7]], CONFIG, 4, sampling=sampling, previous=first)
    scored = rj.score(model, ids, CONFIG, 20)
    disagree = ""
    if mesh is not None:
        try:
            rj.generate(model, list(ids + 96 * jax.process_index()), CONFIG, 2)  # outside one's vocabulary
        except ValueError as error:
            disagree = str(error)
    return {
        "second": second.tokens,
        "tokens": first.tokens + second.tokens,
        "summary": first.metrics.summary(),
        "nll": scored.nll.tolist(),
        "hits": scored.hits.tolist(),
        "disagree": disagree,
    }


def gone_on(mesh: jax.sharding.Mesh | None, folder: Path) -> list[list[int]]:
    """The tokens of `second` from a state that `results` left."""
    model = same_weights()
    if mesh is not None:
        model = replace(model, params=rj.shard_params(model.params, model.config, mesh))
    first = rj.load_state(model, folder)
    return rj.generate(model, [None, [7]], CONFIG, 4, sampling=first.sampling, previous=first).tokens


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.timeout(300)
def test_two_processes_of_two_devices_give_what_one_process_gives(tmp_path):
    alone = results(None, tmp_path / "alone")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    port = str(_free_port())
    command = [sys.executable, "-m", __name__, port, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second
    assert first["disagree"].startswith("the processes of the mesh were given different prompts; give all")
    assert first["tokens"] == alone["tokens"] and first["hits"] == alone["hits"]
    assert first["summary"] == alone["summary"]
    np.testing.assert_allclose(first["nll"], alone["nll"], atol=1e-5)
    assert gone_on(None, tmp_path / "together") == first["gone_on"] == alone["second"]


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    port, place, rank = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
    both = rj.make_mesh(2, 2)
    found = results(both, Path(place) / "together")
    print(json.dumps(found | {"gone_on": gone_on(both, Path(place) / "alone")}))
