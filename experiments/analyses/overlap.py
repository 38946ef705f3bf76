"""`retro-jax overlap`: how many of a query's pages the queries before it had loaded, or only just missed.

That is what retrospection lives on: a page that an earlier query missed by little is loaded for a later one
and then serves both (RetroAttention, section 3).
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from matplotlib.axes import Axes

from retro_jax import DecodeConfig
from retro_jax.cache import LayerState
from retro_jax.experiments.analyses.command import OverlapFlags
from retro_jax.experiments.io.budgets import budget_value
from retro_jax.experiments.io.estimates import Estimate, estimate
from retro_jax.experiments.io.folders import check_new, write_results
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.provenance import provenance
from retro_jax.experiments.io.tables import markdown, number
from retro_jax.experiments.io.text import Texts
from retro_jax.experiments.pictures.files import pictures
from retro_jax.experiments.pictures.panels import COLOURS, QUEST_COLOUR, Curves, Line, Look, Scale
from retro_jax.experiments.pictures.words import counted, listed, shortened
from retro_jax.inputs import check_token_ids
from retro_jax.layers import Window
from retro_jax.methods.eviction import members
from retro_jax.models import Model
from retro_jax.plan import layer_plan
from retro_jax.prompts import run_prefill
from retro_jax.rules import Query, Rules
from retro_jax.selectors import SELECTORS
from retro_jax.sharding import new_state, under_mesh_of_weights
from retro_jax.step import watched_step

RANKS = {"loaded": "loaded", "next": "next k"}
"""Ranks 1..k of a query's pages, which its step loads, and k+1..2k; in words."""


@flax.struct.dataclass
class Ranked:
    """The pages of a query, or of several, in every sparse layer.

    Attributes:
      loaded: those that its step loaded, its k best and the forced ones.
      next: the k best of the others.
    """

    loaded: Bool[Array, "*queries L B K P"]
    next: Bool[Array, "*queries L B K P"]


@dataclass(frozen=True)
class Shares:
    """Of the pages that a query chose, the share that earlier queries had in certain ranks.

    Attributes:
      loaded: in the ranks that their own steps loaded; distance 1 is the query just before.
      next: in as many ranks after those.
    """

    loaded: Float[np.ndarray, "distances L B T"]
    next: Float[np.ndarray, "distances L B T"]


def _rank(rules: Rules, layer: LayerState, query: Query, _: Window) -> Ranked:
    pages = layer.pages.shape[2]
    scores = SELECTORS[rules.score].scores(rules, layer, query, jnp.ones(layer.pages.shape[:3], bool))
    page_ids, counts = rules.choose(scores, query, 2 * query.budgets, min(2 * rules.places, pages))
    loaded = layer.last_loaded == query.positions[:, None, None]
    return Ranked(loaded, members(page_ids, counts, pages) & ~loaded)


@partial(jax.jit, static_argnames=("model", "config"), donate_argnames=("state", "past"))
def _step(params, model, config, state, past, tokens):
    """One step; the shares[distances, L, B], and the queries of the past with the newest in front."""
    newest = state.length // config.page_size
    state, _, ranked = watched_step(params, model, config, state, tokens, watch=_rank)
    now = jax.tree.map(lambda *by_layer: jnp.stack(by_layer), *ranked)
    page = jnp.arange(now.loaded.shape[-1])
    forced = (page < config.sink_pages) | (page == newest[:, None])  # [B, P]
    chosen = now.loaded & ~forced[:, None]
    shares = jax.tree.map(lambda then: jnp.sum(chosen & then, (-2, -1)) / jnp.sum(chosen, (-2, -1)), past)
    return state, jax.tree.map(lambda a, then: jnp.concatenate([a[None], then[:-1]]), now, past), shares


@under_mesh_of_weights
def measure(model: Model, texts: Texts, config: DecodeConfig, distances: int, progress) -> Shares:
    """Decodes along the texts, and compares each query's pages with those of the `distances` before it.

    Forced pages (sink pages, the newest) are none that a query chose. The first `distances` queries have too
    few before them and are left out.

    Args:
      model: the model.
      texts: B of one length, scored as one batch.
      config: how to decode, with a window of 1 and no eviction.
      distances: how many earlier queries.
      progress: called as tokens are done.

    Raises:
      ValueError: every layer is dense, there are too few tokens, or only forced pages are loaded.
    """
    batch, tokens = texts.ids.shape
    steps = tokens - texts.prompt_tokens
    plan = layer_plan(model.config, config)
    if not plan.num_sparse:
        raise ValueError(f"all {model.config.num_layers} layers are dense; lower --dense-layers")
    if not 1 <= distances < steps:
        raise ValueError(
            f"--distances is {distances}; it must be in 1..{steps - 1} for {steps} scored tokens"
        )
    ids = check_token_ids(model.config, texts.ids, "token_ids")
    state = new_state(model.config, config, batch, tokens)
    state, _ = run_prefill(model, config, state, list(ids[:, : texts.prompt_tokens]), progress)
    none = (distances, plan.num_sparse, *state.layers[plan.first_sparse].pages.shape[:3])
    past = Ranked(jnp.zeros(none, bool), jnp.zeros(none, bool))
    found = []
    for step, column in enumerate(ids[:, texts.prompt_tokens :].T, 1):
        state, past, shares = _step(model.params, model.config, config, state, past, column)
        found.append(jax.tree.map(np.asarray, shares))
        progress("decode", step, steps)
    loaded, then = (np.stack([getattr(share, rank) for share in found[distances:]], -1) for rank in RANKS)
    if np.isnan(loaded).any():
        raise ValueError("only pages that are always loaded fit the budget; raise it, or lower --sink-pages")
    return Shares(loaded, then)


def summary(shares: Shares, sparse_layers: Sequence[int]) -> dict:
    """Returns means with standard errors as JSON values: over all sparse layers, and of each."""

    def at(values: Float[np.ndarray, "L B T"]) -> dict:
        return asdict(estimate(values.mean(axis=0)))

    def by_distance(layers: slice) -> list[dict]:
        return [
            {"distance": distance} | {rank: at(getattr(shares, rank)[distance - 1, layers]) for rank in RANKS}
            for distance in range(1, len(shares.loaded) + 1)
        ]

    return {
        "mean": by_distance(slice(None)),
        "layers": {
            str(layer): by_distance(slice(place, place + 1)) for place, layer in enumerate(sparse_layers)
        },
    }


def overlap_report(values: dict) -> str:
    """Returns the result as Markdown."""
    config = values["config"]
    budget = budget_value(DecodeConfig(**config))
    distances = sorted({1, len(values["mean"])})
    ends = [(rank, distance) for rank in RANKS for distance in distances]
    parts = [
        f"# {values['model']} ({values['dtype']}), {', '.join(values['texts'])}: pages of earlier queries",
        f"{values['tokens']} tokens of each text: a prompt of {values['prompt_tokens']}, then teacher-forced "
        f"decoding with Quest. Budget {budget}, page size {config['page_size']}, sink pages "
        f"{config['sink_pages']}, dense layers {config['dense_layers']}.",
        "Of the k pages that a query chose (those that are always loaded are left out), the share that the "
        "query so many steps before had among the k that it loaded, or among its next k; ± is one standard "
        "error, from the means of blocks of tokens.",
        markdown(
            ["steps before", *RANKS.values(), "neither"],
            [
                [
                    str(row["distance"]),
                    *(number(Estimate(**row[rank]), 3) for rank in RANKS),
                    f"{1 - sum(row[rank]['mean'] for rank in RANKS):.3f}",
                ]
                for row in values["mean"]
            ],
        ),
        "## By layer",
        markdown(
            ["layer", *(f"{RANKS[rank]}, {distance} before" for rank, distance in ends)],
            [
                [layer, *(number(Estimate(**rows[distance - 1][rank]), 3) for rank, distance in ends)]
                for layer, rows in values["layers"].items()
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def overlap_pictures(values: dict) -> dict[str, bytes]:
    """Draws the shares against distance, with a thin line for each layer, and against layers.

    Args:
      values: as in results.json.

    Returns:
      PNG files by name.
    """
    share = Scale("share of a query's chosen pages", shown=(0.0, 1.0))
    steps = [row["distance"] for row in values["mean"]]
    layers = [int(layer) for layer in values["layers"]]
    ends = list(dict.fromkeys((1, steps[-1])))
    colours = {"loaded": QUEST_COLOUR, "next": COLOURS[0]}
    markers = dict(zip(RANKS, "os", strict=True))

    def line(name: str, look: Look, x: Sequence[int], points: Sequence[dict]) -> Line:
        mean, error = (np.array([point[part] for point in points], float) for part in ("mean", "error"))
        return Line(name, look, x, mean, mean - error, mean + error)

    def each_layer(axes: Axes) -> None:
        for rank, rows in itertools.product(RANKS, values["layers"].values()):
            means = [row[rank]["mean"] for row in rows]
            axes.plot(steps, means, color=colours[rank], linewidth=0.6, alpha=0.3)

    by_distance, by_layer = [], []
    for rank, words in RANKS.items():
        look = Look(colours[rank], marker=markers[rank])
        points = [row[rank] for row in values["mean"]]
        by_distance.append(line(f"{words}, mean of layers", look, steps, points))
        for distance, dash in zip(ends, ("--", ":"), strict=False):
            look = Look(colours[rank], dash, markers[rank], hollow=distance > 1)
            points = [rows[distance - 1][rank] for rows in values["layers"].values()]
            by_layer.append(line(f"{words}, {distance} before", look, layers, points))
    distance = Scale("steps before the query (thin: each layer)", whole=True)
    thin = each_layer if len(steps) > 1 else None
    panels = [
        Curves(by_distance, distance, share, decorate=thin),
        Curves(by_layer, Scale("layer", whole=True), share),
    ]
    config, texts = values["config"], values["texts"]
    prompt = values["prompt_tokens"]
    queries = counted(values["tokens"] - prompt - len(steps), "query", "queries")
    notes = [
        f"n = {counted(len(texts), 'text')} ({listed(texts)}), {queries} of each after a prompt of {prompt} "
        f"tokens, {counted(len(layers), 'layer')}",
        f"Budget {budget_value(DecodeConfig(**config))}, page size {config['page_size']}, sink pages "
        f"{config['sink_pages']}",
    ]
    title = f"{shortened(values['model'])} ({values['dtype']}): where earlier queries had a query's pages"
    return pictures("overlap", panels, title, notes, interval="one standard error to each side")


class Overlap(OverlapFlags):
    """The command, with its work."""

    def run(self) -> None:
        """Decodes along the texts, then writes and prints the result."""
        check_new(self.out)
        config = self.config.config(method="quest")
        model, texts = self.read([config], padded=False)
        with Progress() as progress:
            shares = measure(model, texts, config, self.distances, progress)
        values = {
            "model": self.model,
            "dtype": model.config.dtype,
            "texts": texts.names,
            "tokens": texts.ids.shape[1],
            "prompt_tokens": self.prompt_tokens,
            "config": asdict(config),
            **summary(shares, layer_plan(model.config, config).sparse_layers),
            "provenance": provenance(),
        }
        report = overlap_report(values)
        if self.out is not None:
            write_results(self.out, values, report, overlap_pictures(values))
        self.show(values, report)
