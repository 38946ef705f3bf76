"""The command `score`: how likely a model finds a text when one method decodes along it."""

from dataclasses import asdict, dataclass

from retro_jax.experiments.io.flags import Configured, OverDevices, TextCommand
from retro_jax.experiments.io.progress import Progress, Rates


@dataclass(kw_only=True)
class Score(Configured, OverDevices, TextCommand):
    """Measure how likely a model finds a text when one method decodes along it.

    Prints mean negative log-likelihood (nats per token), perplexity, and both by position.
    """

    def run(self) -> None:
        """Scores the texts as one batch."""
        import numpy as np

        from retro_jax import score
        from retro_jax.experiments.generate.tables import score_table
        from retro_jax.experiments.io.estimates import estimate
        from retro_jax.experiments.io.provenance import provenance

        config = self.config.config()
        model, texts = self.read([config])
        with Progress() as show:
            rates = Rates(show)
            result = score(model, texts.ids, config, prompt_tokens=texts.prompt_tokens, progress=rates)
        mean = estimate(result.nll)
        values = {
            "model": self.model,
            "config": asdict(config),
            "tokens": texts.ids.shape[1],
            "prompt_tokens": texts.prompt_tokens,
            "nll": asdict(mean),
            "perplexity": float(np.exp(mean.mean)),
            "texts": {name: float(row.mean()) for name, row in zip(texts.names, result.nll, strict=True)},
            "metrics": result.metrics.summary() if result.metrics else None,
            "seconds": rates.seconds,
            "compile_seconds": show.compile_seconds,
            "provenance": provenance(),
        }
        self.show(values, score_table(result.nll, texts.prompt_tokens, texts.names, self.bin_tokens))
