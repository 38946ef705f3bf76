"""Means and standard errors of paired differences of log-likelihoods along a text.

Excess is the negative log-likelihood of each token under a method less that under full attention.
Neighbouring tokens' values are correlated, so standard errors come from the means of blocks of `BLOCK`
tokens. They speak of these texts (each text is a stratum), not of a population of texts. B is the number of
texts, T of tokens.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

BLOCK = 64


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
    the baseline's mean is zero.
    """
    below = float(baseline.mean())
    if below == 0.0:
        return Estimate(float("nan"), float("nan"))
    mean = float(excess.mean()) / below
    return Estimate(mean, standard_error(excess - mean * baseline, block) / abs(below))


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
