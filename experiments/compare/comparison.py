"""Methods, windows and scores over the same texts, teacher-forced through the decode path."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace

import jax
import numpy as np

from retro_jax import DecodeConfig, Model, score
from retro_jax.experiments.compare.folder import ComparisonFolder, Run
from retro_jax.experiments.compare.sweep import quest_of
from retro_jax.experiments.io.budgets import budget_fields
from retro_jax.experiments.io.estimates import Estimate, estimate, position_bins, ratio
from retro_jax.experiments.io.provenance import provenance
from retro_jax.experiments.io.settings import VARIED, run_name
from retro_jax.experiments.io.text import Texts, digest
from retro_jax.experiments.machine.programs import release
from retro_jax.score_files import score_digest


@dataclass(frozen=True)
class Row:
    """What one run shows over some of the texts, against full attention and Quest on the same tokens.

    Attributes:
        run: the run.
        nll: negative log-likelihood per token.
        excess: the same less full attention's.
        ratio: excess over that of Quest with the same budget, page size and other settings; None if that is
            not there.
        by_position: excess in each bin of positions.
        quest_difference: the largest difference of one token's value from that Quest's, None as above.
    """

    run: Run
    nll: Estimate
    excess: Estimate
    ratio: Estimate | None
    by_position: list[Estimate]
    quest_difference: float | None


def identity(model_name: str, model: Model, texts: Texts, common: DecodeConfig) -> dict:
    """Returns what all runs of one comparison share, as JSON values."""
    learned = score_digest(model.params)
    return {
        "model": model_name,
        "dtype": model.config.dtype,
        "texts": texts.names,
        "tokens": texts.ids.shape[1],
        "prompt_tokens": texts.prompt_tokens,
        "token_ids": digest(texts.ids),
        "config": {key: value for key, value in asdict(common).items() if key not in VARIED},
        **({} if learned is None else {"learned": learned}),
    }


def compare(
    model: Model,
    texts: Texts,
    configs: Sequence[DecodeConfig],
    folder: ComparisonFolder,
    progress: Callable[[str], AbstractContextManager[Callable]],
    *,
    budgets_together: bool = False,
) -> list[Run]:
    """Runs every configuration that the folder does not have yet, and returns all runs in it.

    Of several processes the first alone writes, and returns them; they all see the same folder.

    Args:
        model: the model.
        texts: scored together as one batch, so that the weights are read once for all of them.
        configs: what to run.
        folder: each run is written into it as soon as it is finished.
        progress: given a run's title, makes what shows its progress.
        budgets_together: whether configurations that differ in their budgets only are one batch.
    """
    first = jax.process_index() == 0
    missing = [config for config in configs if not folder.has(run_name(config))]
    groups: dict[object, list[DecodeConfig]] = {}
    for number, config in enumerate(missing):
        kind = replace(config, **budget_fields(1.0)) if budgets_together else number
        groups.setdefault(kind, []).append(config)
    count = len(texts.names)
    for number, group in enumerate(groups.values(), 1):
        title = ", ".join(map(run_name, group))
        with progress(f"{number}/{len(groups)} {title}: ") as show:
            start = time.perf_counter()
            result = score(
                model,
                np.tile(texts.ids, (len(group), 1)),
                [config for config in group for _ in range(count)],
                prompt_tokens=texts.prompt_tokens,
                progress=show,
            )
            seconds = (time.perf_counter() - start) / len(group)
            for index, config in enumerate(group if first else ()):
                own = result.of(slice(index * count, (index + 1) * count))
                folder.save(config, own, seconds, provenance())
        release()  # the next group's programs are other ones
    return folder.runs() if first else []


def rows(
    runs: Sequence[Run], bins: Sequence[tuple[int, int]], prompt_tokens: int, text: int | None = None
) -> list[Row]:
    """Returns one row per run, over one of the texts or (None) over all of them together."""
    chosen = slice(None) if text is None else slice(text, text + 1)
    nll = {run.name: run.nll[chosen] for run in runs}
    result = []
    for run in runs:
        excess = nll[run.name] - nll["full"]
        quest = run_name(quest_of(run.config))
        compared = run.config.method != "full" and quest in nll
        result.append(
            Row(
                run=run,
                nll=estimate(nll[run.name]),
                excess=estimate(excess),
                ratio=ratio(excess, nll[quest] - nll["full"]) if compared else None,
                by_position=[
                    estimate(excess[:, start - prompt_tokens : end - prompt_tokens]) for start, end in bins
                ],
                quest_difference=float(np.abs(nll[run.name] - nll[quest]).max()) if compared else None,
            )
        )
    return result


def summary(identity: dict, runs: Sequence[Run], bin_tokens: int) -> dict:
    """Returns everything that a comparison shows, as JSON values, over all texts and over each."""
    bins = position_bins(identity["prompt_tokens"], identity["tokens"], bin_tokens)
    prompt = identity["prompt_tokens"]
    return {
        **identity,
        "position_bins": [list(edges) for edges in bins],
        "runs": [
            {
                "name": run.name,
                "config": asdict(run.config),
                "exposure": run.exposure.tolist(),
                "pages_loaded_per_step": run.pages_loaded,
                "kv_bytes_per_step": run.kv_bytes,
                "seconds": run.seconds,
                "provenance": run.provenance,
            }
            for run in runs
        ],
        "pooled": [_row_values(row) for row in rows(runs, bins, prompt)],
        "per_text": {
            name: [_row_values(row) for row in rows(runs, bins, prompt, text)]
            for text, name in enumerate(identity["texts"])
        },
    }


def _row_values(row: Row) -> dict:
    return (
        {"run": row.run.name}
        | {
            field.name: asdict(value) if isinstance(value := getattr(row, field.name), Estimate) else value
            for field in fields(Row)
            if field.name not in ("run", "by_position")
        }
        | {"by_position": [asdict(part) for part in row.by_position]}
    )
