"""Other programs as contestants of `bench decode`, each in a process of an interpreter that has it."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from retro_jax import Model
from retro_jax.experiments.bench.transformers_export import export
from retro_jax.experiments.io.provenance import cpus

REFERENCE = Path(__file__).with_name("transformers_reference.py")
TORCH_STEP = Path(__file__).with_name("torch_step.py")


class OtherProgram:
    """A program that answers each line {"steps": n} by {"milliseconds": [...], "tokens": [[...]]}.

    Its first line is {"version": ...}.

    Args:
        name: for the table.
        flag: that named the interpreter, for messages.
        command: what to start, an interpreter first.
        log: where what it writes to stderr goes.

    Raises:
        ValueError: the interpreter does not start, or the program fails.
    """

    kv_bytes = None
    expert_bytes = None
    scan = None

    def __init__(self, name: str, flag: str, command: Sequence[object], log: Path):
        self.name, self._flag, self._log = name, flag, log
        try:
            with log.open("w") as errors:
                self._process = subprocess.Popen(
                    [str(part) for part in command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        except OSError as error:
            raise ValueError(f"{flag} {command[0]} does not run: {error}; name an interpreter") from None
        self.version = self._answer()["version"]

    def steps(self, count: int) -> tuple[list[float], list[list[int]]]:
        """As `Contestant`."""
        self._process.stdin.write(json.dumps({"steps": count}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["milliseconds"], answer["tokens"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text().strip().splitlines()[-1:]
            raise ValueError(f"the interpreter of {self._flag} failed: {' '.join(last)}")
        return json.loads(line)


def transformers(python: Path, model: Model, ids: Int[np.ndarray, "B T"], folder: Path) -> OtherProgram:
    """Hugging Face transformers on the same weights, which are exported to a folder.

    Raises:
        ValueError: the interpreter does not start, or the model cannot be exported.
    """
    export(model, folder)
    np.save(folder / "ids.npy", ids)
    command = [python, REFERENCE, folder, folder / "ids.npy", cpus(), model.config.dtype]
    return OtherProgram("transformers", "--reference", command, folder / "transformers.txt")


def torch_step(python: Path, model: Model, batch: int, context: int, folder: Path) -> OtherProgram:
    """A dense step of PyTorch, compiled for the sizes of the model: what else a user could decode by.

    Weights and cache are random: it is there for its time alone.

    Raises:
        ValueError: the interpreter does not start, or the step fails.
    """
    config = model.config
    if config.experts is not None:
        raise ValueError(f"--torch has no step with experts, which {config.name} has; leave it out")
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "width", "hidden_width", "vocab_size")
    sizes = {name: getattr(config, name) for name in names} | {"dtype": config.dtype}
    sizes |= {"batch": batch, "context": context, "threads": cpus()}
    command = [python, TORCH_STEP, json.dumps(sizes)]
    return OtherProgram("torch", "--torch", command, folder / "torch.txt")


def folder_of_processes() -> tempfile.TemporaryDirectory:
    """Where other programs find weights and leave their messages; removed with what it is bound to."""
    return tempfile.TemporaryDirectory(prefix="retro-jax-bench-")
