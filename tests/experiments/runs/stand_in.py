"""A run whose model is a stand-in, for tests that stop and kill it."""

import time
import zlib
from types import SimpleNamespace

from retro_jax.experiments.cli import main
from retro_jax.experiments.runs import run as runner
from retro_jax.models.presets import SIZES


class Letters:
    """A tokenizer whose tokens are letters."""

    chat_template = None

    def encode(self, text, add_bos=None):
        return [ord(letter) for letter in text]


def decode_batch(model, config, task, batch, size, sampling, progress):
    """Results that depend on the example and the method alone, after a moment."""
    time.sleep(0.02)
    return [
        {
            "prompt_tokens": len(row.prompt),
            "tokens": 5,
            "text": "é" * (zlib.crc32(f"{row.example.id} {config}".encode()) % 3000),
        }
        for row in batch
    ]


def run(out, count=24):
    """The process to be killed."""
    runner._load = lambda config: SimpleNamespace(config=SIZES["tiny"], tokenizer=Letters())
    runner.decode_batch = decode_batch
    task = ("--task.pairs", "6", "--task.questions", "2", "--task.count", str(count))
    rest = ("--batch", "2", "--budgets", "128", "--methods", "full", "quest", "retro", "--out", str(out))
    main(["run", "smollm2-recall", "--model", "random:tiny", *task, *rest])
