"""The command `learn`: trains a page score on a model's own attention, and goes on where it was stopped."""

import time
from dataclasses import dataclass
from pathlib import Path

from retro_jax.experiments.io.flags import Command, Hidden

LOG, SETTINGS, CHECKPOINTS = "log.jsonl", "learn.json", "checkpoints"


@dataclass(kw_only=True)
class Learn(Command):
    """Train a page score for a model on its own attention.

    Full attention over the texts tells how much of each query's attention falls on each page; two small maps
    in each layer learn to tell it from 8-bit summaries of the pages. What was trained is used by --preset
    mean-key --score learned --learned OUT, with the page size and the channels that it was trained with. The
    same command continues where it was stopped, by whatever, and comes to the same score.
    """

    learned: Hidden[Path | None] = None
    text: tuple[Path, ...]
    """UTF-8 text files to train on, cut into chunks."""
    out: Path
    """Folder for the score, and for checkpoints while it is trained."""
    page_size: int = 16
    """Tokens of the pages that the score will choose."""
    channels: int = 32
    """Numbers that it keeps of each page, in 8 bits; even, at most the model's head_dim."""
    chunk: int = 4096
    """Tokens of the text that see each other."""
    steps: int = 400
    """Chunks to train on."""
    queries: int = 256
    """Queries of each chunk that count in a step."""
    learning_rate: float = 5e-3
    """The highest; it warms up over a twentieth of the steps and ends at a twentieth of it."""
    held_out: float = 0.05
    """Share of each text's chunks, from its end, that is not trained on; at least one chunk of all."""
    evaluate_every: int = 50
    """Steps between two measurements of held-out chunks, each followed by a checkpoint."""
    budget_tokens: int = 256
    """Tokens of the pages among which held-out attention is looked for."""
    seed: int = 0
    """Of the order of chunks and of the queries that count."""

    def run(self) -> None:
        """Trains what is not trained yet."""
        from retro_jax import DecodeConfig
        from retro_jax.experiments.io.files import read_json
        from retro_jax.experiments.io.folders import ResultFolder
        from retro_jax.experiments.io.progress import Progress
        from retro_jax.experiments.io.provenance import provenance
        from retro_jax.experiments.io.text import check_sources, digest
        from retro_jax.experiments.learn.training import (
            Plan,
            check_learnable,
            checkpoints,
            restore,
            train,
        )
        from retro_jax.score_files import ABOUT, model_identity

        class TrainingFolder(ResultFolder):
            kind, file = "training", SETTINGS

        self._check()
        check_sources(self.text, None, self.chunk)
        config = DecodeConfig("full", sink_pages=0, page_size=self.page_size)

        def check(sizes):
            if self.channels > sizes.head_dim:
                raise ValueError(
                    f"--channels {self.channels} is above {sizes.head_dim}, the model's head_dim; lower it"
                )
            check_learnable(sizes)

        without = ", so it cannot read text; use another model"
        model = self.load([config], 1, self.chunk, check=check, without_tokenizer=without)
        chunks, held_out = self._chunks(model)
        identity = model_identity(model.params, model.config)
        plan = Plan(
            page_size=self.page_size,
            channels=self.channels,
            steps=self.steps,
            queries=self.queries,
            learning_rate=self.learning_rate,
            evaluate_every=self.evaluate_every,
            selected_pages=self.budget_tokens // self.page_size,
            seed=self.seed,
        )
        settings = {
            "model": identity,
            "dtype": model.config.dtype,
            "chunk": self.chunk,
            "texts": [digest(chunks), digest(held_out)],
            **vars(plan),
        }
        folder = TrainingFolder(self.out, settings)
        folder.begin()
        start = time.perf_counter()
        with checkpoints(self.out / CHECKPOINTS) as manager, Progress() as show:
            trained = (manager.latest_step() or 0) < self.steps
            last = train(model, plan, chunks, held_out, manager, show, self._tell)
            best = manager.best_step()
            if trained or not (self.out / ABOUT).exists():
                measured, scores = dict(manager.metrics(best)), restore(manager, best, last).scores
                self._write(model, identity, scores, best, measured, len(chunks))
        about = read_json(self.out / ABOUT)
        about |= {"seconds": time.perf_counter() - start, "provenance": provenance()}
        self.show(about | {"folder": str(self.out)}, self._text(about))

    def _check(self) -> None:
        """Raises ValueError for flags that are not possible, before anything is read."""
        least = {"page_size": 1, "steps": 1, "queries": 1, "evaluate_every": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below {low}")
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"--channels {self.channels} is not an even number of 2 or more")
        if self.chunk % self.page_size or self.chunk < 2 * self.page_size:
            raise ValueError(
                f"--chunk {self.chunk} is not a multiple of --page-size {self.page_size}, twice it or more"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out {self.held_out} is not a share between 0 and 1")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate {self.learning_rate} is not above 0")
        if self.budget_tokens < 2 * self.page_size:
            raise ValueError(
                f"--budget-tokens {self.budget_tokens} is below two pages of {self.page_size} tokens, the "
                "first and the newest"
            )
        if self.budget_tokens >= self.chunk:
            raise ValueError(
                f"--budget-tokens {self.budget_tokens} covers all of a chunk of {self.chunk} tokens, so that "
                "any score would find all held-out attention; lower it, or raise --chunk"
            )

    def _chunks(self, model):
        """Token ids [chunks, T] to train on and held out."""
        import numpy as np

        from retro_jax.experiments.io.text import read_text

        trained, held_out = [], []
        for path in self.text:
            ids = np.array(model.tokenizer.encode(read_text(path)), np.int32)
            count = len(ids) // self.chunk
            if not count:
                raise ValueError(
                    f"{path} has {len(ids)} tokens, fewer than a chunk of {self.chunk}; lower --chunk, or "
                    "leave the text out"
                )
            rows = ids[: count * self.chunk].reshape(count, self.chunk)
            aside = round(self.held_out * count)
            trained.append(rows[: count - aside])
            held_out.append(rows[count - aside :])
        trained, held_out = np.concatenate(trained), np.concatenate(held_out)
        if not len(held_out):
            trained, held_out = trained[:-1], trained[-1:]
        if not len(trained):
            raise ValueError(
                f"the texts make one chunk of {self.chunk} tokens, which is held out, and none to train on; "
                "give more text or lower --chunk"
            )
        return trained, held_out

    def _tell(self, measured: dict) -> None:
        """Adds a line to the folder's log, and shows it."""
        import json
        import sys

        with (self.out / LOG).open("a") as stream:
            stream.write(json.dumps(measured) + "\n")
        print(
            f"step {measured['step']}: divergence {measured['divergence']:.4f} nats, held-out recall "
            f"{measured['recall']:.4f} (mean keys {measured['mean_key']:.4f}, exact {measured['exact']:.4f})",
            file=sys.stderr,
        )

    def _write(self, model, identity, scores, step, measured, chunks) -> None:
        """Writes the score: its weights, then what it is."""
        import safetensors.numpy

        from retro_jax.experiments.io.files import write_bytes, write_json
        from retro_jax.score_files import ABOUT, WEIGHTS, score_about, score_tensors

        weights = safetensors.numpy.save(score_tensors(scores))
        about = score_about(model, identity, scores, weights)
        about |= {"step": step, "steps": self.steps, "chunks": chunks, "chunk": self.chunk, **measured}
        about["texts"] = [path.name for path in self.text]
        write_bytes(self.out / WEIGHTS, weights)
        write_json(self.out / ABOUT, about)

    def _text(self, about: dict) -> str:
        best, keys, exact = (f"{about[name]:.4f}" for name in ("recall", "mean_key", "exact"))
        return (
            f"Held-out recall of {self.budget_tokens} tokens in pages of {self.page_size}: {best} at step "
            f"{about['step']} (mean keys {keys}, exact attention {exact})\n"
            f"Use it: --preset mean-key --score learned --learned {self.out} --page-size {self.page_size} "
            f"--score-channels {self.channels}"
        )
