"""Scores as Markdown tables."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from retro_jax.experiments.io.estimates import estimate, position_bins
from retro_jax.experiments.io.tables import markdown, number


def score_table(
    nll: Float[np.ndarray, "B T"], prompt_tokens: int, names: Sequence[str], bin_tokens: int
) -> str:
    """Returns the table of one method's negative log-likelihood and perplexity by position.

    Args:
      nll: of each scored token.
      prompt_tokens: the position of the first.
      names: of the texts.
      bin_tokens: width of a range of positions.
    """
    bins = position_bins(prompt_tokens, prompt_tokens + nll.shape[1], bin_tokens)
    texts = list(zip(names, nll[:, None], strict=True))
    if len(texts) > 1:
        texts.append(("all", nll))
    header = ["text", "NLL", "perplexity", *(f"{start}-{end - 1}" for start, end in bins)]
    body = []
    for name, values in texts:
        parts = [values[:, start - prompt_tokens : end - prompt_tokens] for start, end in bins]
        mean = estimate(values)
        body.append(
            [name, number(mean), f"{np.exp(mean.mean):.3f}", *(f"{part.mean():.4f}" for part in parts)]
        )
    return markdown(header, body)
