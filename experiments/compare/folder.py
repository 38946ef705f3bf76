"""The folder of a comparison: raw arrays per run, written at once and never overwritten."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from retro_jax import DecodeConfig, Score
from retro_jax.experiments.io.files import write_file
from retro_jax.experiments.io.folders import ResultFolder, reading
from retro_jax.experiments.io.settings import order, run_name


@dataclass(frozen=True)
class Run:
    """One method's finished pass over the texts.

    Attributes:
        name: the file's stem, unique in its folder.
        config: what decoded.
        nll: negative log-likelihood of every scored token, natural logarithm.
        exposure: pages a query has attended to after 0, 1, ... later steps, over those of its own step.
        pages_loaded: that a step loaded per sparse layer and KV head, on average.
        kv_bytes: bytes of keys, values and page statistics that a step loaded for a text, on average.
        seconds: wall time of the pass, compilation included.
        provenance: where it was computed.
    """

    name: str
    config: DecodeConfig
    nll: Float[np.ndarray, "B T"]
    exposure: Float[np.ndarray, " W"]
    pages_loaded: float
    kv_bytes: float
    seconds: float
    provenance: dict


class ComparisonFolder(ResultFolder):
    """A folder of runs of one comparison: the same model, texts and common settings."""

    kind, file = "comparison", "comparison.json"

    def has(self, name: str) -> bool:
        """Tells whether the run is finished."""
        return self._file(name).exists()

    def save(self, config: DecodeConfig, result: Score, seconds: float, provenance: dict) -> None:
        """Writes one finished run."""
        name = run_name(config)
        metrics = result.metrics
        about = {
            "config": asdict(config),
            "seconds": seconds,
            "provenance": provenance,
            "metrics": metrics.summary(),
        }
        file = self._file(name)
        if file.exists():
            raise FileExistsError(f"{file} is finished already; nothing is overwritten")
        self.begin()
        file.parent.mkdir(exist_ok=True)
        arrays = {
            "nll": result.nll,
            "pages_attended": metrics.pages_attended,
            "pages_loaded": metrics.pages_loaded,
            "kv_bytes": metrics.kv_bytes,
            "about": json.dumps(about),
        }
        write_file(file, lambda stream: np.savez_compressed(stream, **arrays))

    def load(self, name: str) -> Run:
        """Reads one finished run.

        Raises:
            ValueError: its file is damaged.
        """
        with reading(self._file(name)), np.load(self._file(name), allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            return Run(
                name=name,
                config=DecodeConfig(**about["config"]),
                nll=arrays["nll"],
                exposure=np.array(about["metrics"]["exposure"], float),
                pages_loaded=about["metrics"]["pages_loaded"],
                kv_bytes=about["metrics"]["kv_bytes"],
                seconds=about["seconds"],
                provenance=about["provenance"],
            )

    def runs(self) -> list[Run]:
        """Reads every finished run, full attention first, then in the order of `order`."""
        found = [self.load(file.stem) for file in (self.path / "runs").glob("*.npz")]
        return sorted(found, key=lambda run: order(run.config))

    def _file(self, name: str) -> Path:
        return self.path / "runs" / f"{name}.npz"
