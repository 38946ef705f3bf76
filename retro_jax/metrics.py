"""What decoding attended to and read, gathered on the host from the metrics of each step."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from retro_jax.cache import StepMetrics
from retro_jax.sharding import to_host


@dataclass(frozen=True)
class Metrics:
    """Metrics of a run of steps that began with an empty window.

    Attributes:
      pages_attended: [steps, B, W], pages that the query of age a (0 is the newest) newly attended to, the
        mean over sparse layers and KV heads.
      pages_loaded: [steps, B], pages loaded, likewise; 0 where the sequence was not active.
      kv_bytes: [steps, B], bytes of keys, values and page statistics read over all layers.
      expert_bytes: [steps, B], bytes of the weights of experts read for all sequences, shared equally by
        them; None of a model without experts.
    """

    pages_attended: np.ndarray
    pages_loaded: np.ndarray
    kv_bytes: np.ndarray
    expert_bytes: np.ndarray | None = None

    @classmethod
    def gather(cls, calls: Sequence[StepMetrics]) -> "Metrics":
        """From the stacked metrics of consecutive calls.

        Raises:
          ValueError: there are none.
        """
        if not calls:
            raise ValueError("no decode steps were taken, so there is nothing to measure")
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays).astype(np.float64), *to_host(calls))
        return cls(joined.pages_attended, joined.pages_loaded, joined.kv_bytes, joined.expert_bytes)

    def of(self, sequences: slice) -> "Metrics":
        """Those of some of the sequences."""
        return Metrics(
            self.pages_attended[:, sequences],
            self.pages_loaded[:, sequences],
            self.kv_bytes[:, sequences],
            None if self.expert_bytes is None else self.expert_bytes[:, sequences],
        )

    def exposure(self) -> np.ndarray:
        """Pages a query has attended to after 0..W-1 later steps, over those of its own step: [W].

        The paper's effective KV budget. NaN where no step loaded pages (full attention) or none was late
        enough.
        """
        steps, _, window = self.pages_attended.shape
        active = self.kv_bytes > 0
        newly = np.full(window, np.nan)
        for age in range(min(window, steps)):
            rows = active[age:]
            if rows.any():
                newly[age] = self.pages_attended[age:, :, age][rows].mean()
        own = newly[0] if newly[0] > 0 else np.nan
        return np.cumsum(newly) / own

    def summary(self) -> dict[str, object]:
        """Plain numbers: active steps, mean pages loaded and bytes of a step, exposure by later steps."""
        active = self.kv_bytes > 0
        count = max(int(active.sum()), 1)
        of_experts = (
            {} if self.expert_bytes is None else {"expert_bytes": float(self.expert_bytes.sum() / count)}
        )
        return of_experts | {
            "steps": int(active.sum()),
            "pages_loaded": float(self.pages_loaded.sum() / count),
            "kv_bytes": float(self.kv_bytes.sum() / count),
            "exposure": [None if np.isnan(value) else float(value) for value in self.exposure()],
        }
