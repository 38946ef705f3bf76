"""The command `convert`: a model as a folder that loads at once, on one device or many."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from retro_jax.experiments.io.flags import Command


@dataclass(kw_only=True)
class Convert(Command):
    """Write a model into a new folder that loads at once, on one device or many.

    The folder has all of the model: weights as a decode step wants them, sizes, tokenizer and chat template.
    It is taken wherever a model is.
    """

    folder: tyro.conf.Positional[Path]
    """The new folder."""

    def run(self) -> None:
        """Reads the model and writes it."""
        import time

        import jax

        from retro_jax import DecodeConfig
        from retro_jax.experiments.io.provenance import provenance
        from retro_jax.models import save_model
        from retro_jax.models.formats.checkpoint import check_new

        if self.learned is not None:
            raise ValueError(
                "convert writes a model without a learned score; leave --learned out, and give it where the "
                "folder is decoded with (rj.save_model writes a model with its score)"
            )
        check_new(self.folder)
        model = self.load([DecodeConfig("full")], 1, 1)
        begin = time.perf_counter()
        save_model(model, self.folder)
        seconds = time.perf_counter() - begin
        size = sum(weight.nbytes for weight in jax.tree.leaves(model.params))
        values = {
            "model": self.model,
            "folder": str(self.folder),
            "dtype": model.config.dtype,
            "bytes": size,
            "seconds": seconds,
            "provenance": provenance(),
        }
        self.show(values, f"{self.folder}: {size / 1e9:.2f} GB of weights in {model.config.dtype}")
