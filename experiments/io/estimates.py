"""How sure a mean is: standard errors along texts, and intervals over examples.

Excess is the negative log-likelihood of each token under a method less that under full attention.
Neighbouring tokens' values are correlated, so standard errors come from the means of blocks of `BLOCK`
tokens. They speak of these texts (each text is a stratum), not of a population of texts. B is the number of
texts, T of tokens.

The examples of a task are drawn from a population, and each has one value: intervals of their means are
bootstrap intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

BLOCK = 64
RESAMPLES = 2000
LEAST_EXAMPLES = 6
"""Values of which an interval is told: the range of fewer holds their median with a probability below 95%."""

ERRORS_FROM_ZERO = 2
"""Standard errors by which a mean must differ from zero, that shares of it say something."""
UNTOLD = f"A dash: what is divided by is within {ERRORS_FROM_ZERO} standard errors of 0, or 0"
"""What tables say where they show a `ratio`."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; the error is NaN where fewer than two whole blocks lie in a text."""

    mean: float
    error: float


def block_means(values: Float[np.ndarray, "B T"], block: int = BLOCK) -> Float[np.ndarray, "B blocks"]:
    """Returns the means of consecutive whole blocks of tokens; what is left at the end is dropped."""
    whole = values.shape[1] // block
    return values[:, : whole * block].reshape(values.shape[0], whole, block).mean(axis=2)


def standard_error(values: Float[np.ndarray, "B T"], block: int = BLOCK) -> float:
    """Returns the standard error of the mean over all texts and tokens, from block means within each text."""
    means = block_means(values, block)
    texts, blocks = means.shape
    if blocks < 2:
        return float("nan")
    return float(np.sqrt(means.var(axis=1, ddof=1).sum() / blocks) / texts)


def estimate(values: Float[np.ndarray, "B T"], block: int = BLOCK) -> Estimate:
    """Returns the mean over all tokens of all texts, with its standard error."""
    return Estimate(float(values.mean()), standard_error(values, block))


def ratio(
    excess: Float[np.ndarray, "B T"], baseline: Float[np.ndarray, "B T"], block: int = BLOCK
) -> Estimate:
    """Returns mean(excess) / mean(baseline), paired token by token.

    The standard error is the linearised one, that of (excess - ratio * baseline) / mean(baseline). NaN where
    the baseline's mean is zero, or may be by its own standard error (`UNTOLD`).
    """
    below = estimate(baseline, block)
    if below.mean == 0.0 or abs(below.mean) <= ERRORS_FROM_ZERO * below.error:
        return Estimate(float("nan"), float("nan"))
    mean = float(excess.mean()) / below.mean
    return Estimate(mean, standard_error(excess - mean * baseline, block) / abs(below.mean))


def position_bins(prompt_tokens: int, tokens: int, width: int) -> list[tuple[int, int]]:
    """Returns [start, end) positions of the scored tokens' bins, `width` wide from the prompt's end on.

    A last bin narrower than half of `width` joins the one before it.
    """
    starts = list(range(prompt_tokens, tokens, width))
    if len(starts) > 1 and tokens - starts[-1] < width / 2:
        starts.pop()
    return list(zip(starts, [*starts[1:], tokens], strict=True))


def running_mean(
    values: Float[np.ndarray, "B T"], span: int, block: int = BLOCK
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Returns centres (tokens from the start), means and standard errors over `span` blocks in a row."""
    means = block_means(values, block)
    texts, blocks = means.shape
    if blocks < span:
        raise ValueError(f"span {span} exceeds the {blocks} blocks of {block} tokens; lower the span")
    windows = np.lib.stride_tricks.sliding_window_view(means, span, axis=1)  # (B, points, span)
    centres = (np.arange(blocks - span + 1) + span / 2) * block
    if span == 1:
        return centres, windows.mean(axis=(0, 2)), np.full(len(centres), np.nan)
    error = np.sqrt(windows.var(axis=2, ddof=1).sum(axis=0) / span) / texts
    return centres, windows.mean(axis=(0, 2)), error


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval; NaN for the ends where there are fewer than `LEAST_EXAMPLES` values."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        """The mean and the interval in brackets."""
        if np.isnan(self.low):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def bootstrap(*groups: Sequence[float]) -> Interval:
    """The mean and its 95% bootstrap interval (percentiles) over values, one for each example.

    Several groups, each resampled by itself, count the same: the mean is that of their means.
    """
    arrays = [np.asarray(values, float) for values in groups]
    mean = float(np.mean([values.mean() for values in arrays]))
    if min(map(len, arrays)) < LEAST_EXAMPLES:
        return Interval(mean, float("nan"), float("nan"))
    rng = np.random.default_rng(0)
    picks = [values[rng.integers(len(values), size=(RESAMPLES, len(values)))] for values in arrays]
    low, high = np.percentile(np.mean([picked.mean(axis=1) for picked in picks], axis=0), (2.5, 97.5))
    return Interval(mean, float(low), float(high))
