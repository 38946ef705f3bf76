import importlib
import math

import jax
import numpy as np
import pytest

from retro_jax import DecodeConfig, init_state
from retro_jax.experiments.machine import memory as memories
from retro_jax.experiments.machine.devices import host_memory_left
from retro_jax.experiments.machine.memory import check_memory, memory
from retro_jax.models.presets import SIZES
from retro_jax.models.transformer import random_params

TINY = SIZES["tiny"]
RETRO = DecodeConfig(budget_tokens=64)


def test_batches_are_spread_and_weights_are_not():
    found, halved = (memory(TINY, RETRO, batch=2, capacity=256, data_devices=n) for n in (1, 2))
    assert halved.state == pytest.approx(found.state / 2, rel=0.01) and halved.weights == found.weights
    assert found.state == sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_state(TINY, RETRO, 2, 256)))
    )


def test_the_prefill_takes_no_less_than_is_told():
    tokens = jax.ShapeDtypeStruct((2, 256), "int32")
    each = jax.ShapeDtypeStruct((2,), "int32")
    params = jax.eval_shape(lambda: random_params(TINY, jax.random.key(0)))
    state = jax.eval_shape(lambda: init_state(TINY, RETRO, 2, 1024))
    from retro_jax.experiments.runs.compile import _extend

    compiled = _extend.lower(params, TINY, RETRO, state, tokens, each).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > memory(TINY, RETRO, 2, 1024).prefill * 0.9


def test_what_does_not_fit_is_refused_with_its_parts(monkeypatch):
    parts = memory(TINY, RETRO, 2, 256)
    monkeypatch.setattr(memories, "memory_left", lambda: parts.total)
    check_memory(TINY, [RETRO], 2, 256)
    check_memory(TINY, [RETRO], 2, 256, loaded=True)
    with pytest.raises(ValueError, match=r"tiny with 2 x 256 tokens does not fit: .*GB \(weights .*cache"):
        check_memory(TINY, [RETRO] * 2, 2, 256, together=2)
    check_memory(TINY, [RETRO] * 3, 2, 256, together=1)
    monkeypatch.setattr(memories, "memory_left", lambda: parts.total + parts.state)
    check_memory(TINY, [RETRO] * 5, 2, 256, together=2)
    with pytest.raises(ValueError, match=r"\(a smaller --together\), fewer tokens or sequences"):
        check_memory(TINY, [RETRO] * 5, 2, 256, together=3)
    monkeypatch.setattr(memories, "memory_left", lambda: parts.total)
    with pytest.raises(ValueError, match=r"use fewer tokens or sequences, a smaller model or --dtype"):
        check_memory(TINY, [RETRO], 3, 256)
    with pytest.raises(ValueError, match="does not fit"):  # simulated devices share one memory
        check_memory(TINY, [RETRO], 2, 256, data_devices=2)
    monkeypatch.setattr(memories, "memory_left", lambda: None)
    check_memory(SIZES["llama3.1-70b"], [RETRO], 64, 4096)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--max-new-tokens", 100_000),
        ("score", "--tokens", 100_000),
        ("compare", "--tokens", 100_000),
        ("overlap", "--tokens", 100_000),
        ("bench", "decode", "--contexts", 100_000),
    ],
)
def test_every_command_refuses_before_weights_are_made(failure, monkeypatch, tmp_path, arguments):
    np.save(tmp_path / "ids.npy", np.ones(8 if "generate" in arguments else 100_000, np.int32))
    monkeypatch.setattr(memories, "memory_left", lambda: 10 << 30)
    words, flags = [word for word in arguments if str(word).isalpha()], arguments[-2:]
    ids = () if "bench" in words else ("--token-ids", tmp_path / "ids.npy")
    line = failure(*words, "random:llama3.1-8b", *ids, *flags)
    assert "does not fit: it takes at least " in line and "10.74 GB are left on this machine's" in line


@pytest.mark.parametrize(
    ("arguments", "maker", "sizes"),
    [
        (("generate", "random:tiny", "--max-new-tokens", 5), "retro_jax.generate", (4, 256)),
        (("generate", "random:tiny", "--max-new-tokens", 5, "--capacity", 77), "retro_jax.generate", (4, 77)),
        (("score", "random:tiny", "--tokens", 300, "--prompt-tokens", 9), "retro_jax.score", (4, 512)),
        (("overlap", "random:tiny", "--tokens", 300, "--prompt-tokens", 9, "--dense-layers", 0),
         "retro_jax.experiments.analyses.overlap", (3, 300)),
        (("run", "smollm2-recall", "--batch", 3, "--task.pairs", 8, "--task.questions", 3),
         "retro_jax.score", (4, 256)),
    ],
)  # fmt: skip
def test_what_is_checked_is_what_is_made(
    failure, monkeypatch, tmp_path, tiny_folder, arguments, maker, sizes
):
    checked = []
    tell = memories.memory
    monkeypatch.setattr(memories, "memory", lambda *args: checked.append(args[2:4]) or tell(*args))

    def make(model, config, rows, capacity):
        assert (rows, capacity) == sizes
        raise ValueError("made")

    monkeypatch.setattr(importlib.import_module(maker), "new_state", make)
    np.save(tmp_path / "ids.npy", np.ones((3, 60 if "generate" in arguments else 300), np.int32))
    if "run" in arguments:
        extra = ("--model", tiny_folder, "--out", tmp_path / "out")
    else:
        extra = ("--token-ids", tmp_path / "ids.npy")
    assert "made" in failure(*arguments, *extra)
    assert checked[-1] == sizes


def test_kernels_without_room_are_skipped_in_words(command, monkeypatch):
    monkeypatch.setattr(memories, "memory_left", lambda: 1000)
    flags = ("--operations", "update", "--cases", "1x64@0.5", "--implementations", "xla", "--calls", 2)
    status, _, err = command("bench", "kernels", *flags, "--baselines", "--ceiling-bytes", 2**16)
    assert status == 2 and "does not fit: it takes at least" in err and "2 sets of inputs" in err


def test_models_of_unknown_size_are_checked_when_they_are_read(failure, monkeypatch, ids_file):
    monkeypatch.setattr("retro_jax.experiments.io.models.known_model", lambda *_: None)
    monkeypatch.setattr(memories, "memory_left", lambda: 10**6)
    line = failure("generate", "random:tiny", "--token-ids", ids_file, "--max-new-tokens", 4000)
    assert "does not fit" in line and "weights" not in line


def files(root, **contents):
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal: 2000 kB\nMemAvailable: 1000 kB\nSwapFree: 8 kB\n"
STAT = "anon 1\ninactive_file 30\nactive_file 20\n"


def test_memory_of_the_host(tmp_path):
    files(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/a/b\n")
    assert host_memory_left(tmp_path) == 1008 * 1024
    group = "sys__fs__cgroup__a__"
    files(
        tmp_path,
        **{
            group + "memory_DOT_max": "5000\n",
            group + "memory_DOT_current": "4000\n",
            group + "memory_DOT_stat": STAT,
            group + "b__memory_DOT_max": "max\n",
            group + "b__memory_DOT_current": "9\n",
            group + "b__memory_DOT_stat": STAT,
        },
    )
    assert host_memory_left(tmp_path) == 5000 - 4000 + 50 + 8 * 1024


def test_memory_of_the_host_in_older_groups(tmp_path):
    files(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="5:cpu:/\n4:memory:/a\n")
    group = "sys__fs__cgroup__memory__a__"
    files(
        tmp_path,
        **{
            group + "memory_DOT_limit_in_bytes": "700\n",
            group + "memory_DOT_usage_in_bytes": "600\n",
            group + "memory_DOT_stat": STAT,
        },
    )
    assert host_memory_left(tmp_path) == 150 + 8 * 1024
    assert host_memory_left(tmp_path / "no-proc") > 1e8  # all that the machine has
