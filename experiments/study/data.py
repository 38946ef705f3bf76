"""A study's numbers in two small files: excess by text and block of tokens, and what each run was.

B is the number of texts. Differences of block means are paired as differences of tokens are: standard errors
come from blocks anyway (`retro_jax.experiments.io.estimates`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from retro_jax import DecodeConfig
from retro_jax.experiments.compare.folder import Run
from retro_jax.experiments.io.budgets import budget_fields, budget_value
from retro_jax.experiments.io.estimates import BLOCK, block_means
from retro_jax.experiments.io.files import read_json, write_file, write_json
from retro_jax.experiments.io.settings import run_name
from retro_jax.experiments.study.variants import QUEST, every_variant

ABOUT, BLOCKS = "study.json", "study.npz"


@dataclass(frozen=True)
class Result:
    """One variant at one budget.

    Attributes:
        variant: a name of `every_variant`.
        budget: up to 1 a share of the context, above it tokens.
        kv_bytes: of keys, values and page statistics that a step loaded for a text, on average.
        excess: negative log-likelihood over full attention's, nats per token, by block of `BLOCK` tokens.
    """

    variant: str
    budget: float
    kv_bytes: float
    excess: Float[np.ndarray, "B blocks"] = field(repr=False)


@dataclass(frozen=True)
class Cell:
    """One model on one kind of text.

    Attributes:
        model: its name.
        domain: the kind of text.
        texts: names of the texts.
        tokens: of each text, the prompt included.
        prompt_tokens: that were read at once and not scored.
        dtype: of weights and activations, and of caches that are not in 8 bits.
        full_bytes: as `Result.kv_bytes`, of full attention.
        provenance: where it was computed.
        full: negative log-likelihood of full attention, nats per token, by block.
        results: what ran.
    """

    model: str
    domain: str
    texts: Sequence[str]
    tokens: int
    prompt_tokens: int
    dtype: str
    full_bytes: float
    provenance: dict
    full: Float[np.ndarray, "B blocks"] = field(repr=False)
    results: Sequence[Result] = field(repr=False)

    @property
    def name(self) -> str:
        """The model and the kind of text, in words."""
        return f"{self.model}, {self.domain}"

    @property
    def budgets(self) -> list[float]:
        """Budgets at which Quest ran, tokens before shares."""
        found = {result.budget for result in self.results if result.variant == QUEST}
        return sorted(found, key=lambda budget: (budget <= 1, budget))

    def result(self, variant: str, budget: float) -> Result | None:
        """Returns what a variant gave at a budget; None where it did not run."""
        wanted = variant, budget
        return next((one for one in self.results if (one.variant, one.budget) == wanted), None)


def check_length(tokens: int, prompt_tokens: int) -> None:
    """Raises ValueError where fewer tokens are scored than two blocks have, which errors come from."""
    if tokens - prompt_tokens < 2 * BLOCK:
        raise ValueError(
            f"{tokens} tokens less a prompt of {prompt_tokens} are below {2 * BLOCK}, two blocks of {BLOCK} "
            "tokens, which errors come from; raise --tokens"
        )


def cell(model: str, domain: str, identity: dict, runs: Sequence[Run]) -> Cell:
    """Returns the numbers of one comparison's runs that are variants of a study.

    Args:
        model: its name.
        domain: the kind of text.
        identity: what the runs share, see `retro_jax.experiments.compare.identity`.
        runs: full attention's among them.
    """
    full = next(run for run in runs if run.config.method == "full")
    budgets = {budget_value(run.config) for run in runs if run.config.method != "full"}
    by_name = {run.name: run for run in runs}
    # Full attention with another cache, which no budget binds, stands at each of them.
    found = {
        (name, budget): _run_of(by_name, replace(full.config, **fields, **budget_fields(budget)))
        for name, fields in every_variant().items()
        for budget in sorted(budgets)
    }
    return Cell(
        model=model,
        domain=domain,
        texts=tuple(identity["texts"]),
        tokens=identity["tokens"],
        prompt_tokens=identity["prompt_tokens"],
        dtype=identity["dtype"],
        full_bytes=full.kv_bytes,
        provenance=full.provenance,
        full=block_means(full.nll),
        results=tuple(
            Result(*at, run.kv_bytes, block_means(run.nll - full.nll)) for at, run in found.items() if run
        ),
    )


def _run_of(runs: Mapping[str, Run], config: DecodeConfig) -> Run | None:
    """The run of a configuration, among runs by name, which does not tell a learned score's channels."""
    run = runs.get(run_name(config))
    return run if run and run.config.score_channels == config.score_channels else None


def save(folder: Path, cells: Sequence[Cell]) -> None:
    """Writes `ABOUT` and `BLOCKS`; excess with 11 significant bits, a relative error below 0.0005.

    Raises:
        OSError: a file could not be written.
    """
    about = []
    arrays = {}
    for number, one in enumerate(cells):
        fields = {key: value for key, value in vars(one).items() if key not in ("full", "results")}
        kept = ("variant", "budget", "kv_bytes")
        about.append(fields | {"runs": [{key: getattr(run, key) for key in kept} for run in one.results]})
        arrays[f"full{number}"] = one.full.astype(np.float32)
        arrays[f"excess{number}"] = np.array([result.excess for result in one.results], np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / BLOCKS, lambda stream: np.savez_compressed(stream, **arrays))
    write_json(folder / ABOUT, {"block_tokens": BLOCK, "cells": about})


def load(folder: Path) -> list[Cell]:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: the folder holds no study.
        ValueError: its files are damaged, or do not belong together.
    """
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(f"{folder} holds no study ({ABOUT} is not there)")
    about = read_json(folder / ABOUT)
    found = []
    try:
        with np.load(folder / BLOCKS, allow_pickle=False) as arrays:
            for number, fields in enumerate(about["cells"]):
                runs = fields.pop("runs")
                full, excess = arrays[f"full{number}"], arrays[f"excess{number}"].astype(np.float64)
                if excess.shape != (len(runs), *full.shape):
                    raise ValueError(f"{len(runs)} runs and excess of shape {excess.shape}")
                results = [Result(**run, excess=own) for run, own in zip(runs, excess, strict=True)]
                found.append(Cell(**fields, full=full.astype(np.float64), results=results))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{folder / BLOCKS} and {ABOUT} are damaged or do not belong together ({error}); restore both"
        ) from error
    return found
