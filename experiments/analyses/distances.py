"""`retro-jax distances`: how far sparse decoding is from full attention, inside, and what a window changes.

A text is decoded beside full attention's own pass over it. What the cache holds of a token is compared 0, 1,
2, ... steps after the token was decoded: with a window of w it changes w-1 times, and stays as it is then.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import KEYS, VALUES, Pages
from retro_jax import DecodeConfig
from retro_jax.cache import LayerState
from retro_jax.experiments.analyses.command import VARIED, DistancesFlags
from retro_jax.experiments.analyses.distances_shown import distances_pictures, distances_report, summary
from retro_jax.experiments.analyses.window import FullAttention, cached, full_attention, relative_distance
from retro_jax.experiments.io.budgets import budget_value
from retro_jax.experiments.io.estimates import block_means
from retro_jax.experiments.io.files import write_file
from retro_jax.experiments.io.folders import ResultFolder, reading, write_results
from retro_jax.experiments.io.identity import known_identity
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.provenance import provenance
from retro_jax.experiments.io.text import Texts, digest
from retro_jax.experiments.machine.memory import check_room, gigabytes
from retro_jax.experiments.machine.programs import release
from retro_jax.inputs import check_token_ids
from retro_jax.layers import Window
from retro_jax.models import Model, ModelConfig
from retro_jax.plan import layer_plan
from retro_jax.presets import PRESETS
from retro_jax.prompts import run_prefill
from retro_jax.rules import Query, Rules
from retro_jax.sharding import new_state, under_mesh_of_weights
from retro_jax.sizes import MIN_STEPS, program_length
from retro_jax.step import watched_step

STEPS_PER_CALL = 64


@flax.struct.dataclass
class Distances:
    """Of every decoded token that has reached the highest age, in every sparse layer.

    Distances are the length of the difference over the length of what full attention has, all heads together.
    A token's query is compared with itself as its own step computed it: the output that is kept for it was
    made by that one for the most part, and in layers above a revision it is not the query of now.

    Attributes:
      keys: distance of the cache's keys from full attention's, by age.
      values: likewise.
      outputs: distance of attention outputs, while the token is in the window.
      cosine: between the query now and in its own step, the mean over heads; while it is in the window.
      norm: length of the query now over that in its own step, likewise.
    """

    keys: Float[np.ndarray, "ages L B T"]
    values: Float[np.ndarray, "ages L B T"]
    outputs: Float[np.ndarray, "W L B T"]
    cosine: Float[np.ndarray, "W L B T"]
    norm: Float[np.ndarray, "W L B T"]


def _window(rules: Rules, layer: LayerState, query: Query, window: Window) -> Window:
    return window


def _compare(
    pages: Pages,
    window: Window,
    first: Float[Array, "B W N D"],
    full: FullAttention,
    positions: Int[Array, " A"],
    slots: Int[Array, " W"],
) -> Distances:
    """One layer after one step; [B, ages] and [B, W], slots as they are, oldest first."""

    def distance(vectors, expected, at):
        return relative_distance(vectors.astype(jnp.float32), expected[:, at].astype(jnp.float32))

    now, then = window.q.astype(jnp.float32), first.astype(jnp.float32)
    length_now, length_then = (jnp.linalg.norm(q, axis=-1) for q in (now, then))
    return Distances(
        keys=distance(cached(pages, positions, KEYS), full.k, positions),
        values=distance(cached(pages, positions, VALUES), full.v, positions),
        outputs=distance(window.o, full.o, slots),
        cosine=jnp.mean(jnp.sum(now * then, axis=-1) / (length_now * length_then), axis=-1),
        norm=jnp.mean(length_now / length_then, axis=-1),
    )


@partial(jax.jit, static_argnames=("model", "config", "ages"), donate_argnames=("state", "past"))
def _steps(params, model, config, ages, full, state, past, tokens, active):
    """Decodes tokens[T, B]; the state, the older slots' first queries by layer, and what `_compare` gives."""
    sparse = layer_plan(model, config).sparse

    def step(carry, inputs):
        state, past = carry
        tokens, active = inputs
        newest = state.length[0]  # all texts are of one length
        # What reaches back into the prompt is no token's value and is left out where steps are joined.
        positions = jnp.maximum(newest - jnp.array(ages), 0)
        slots = jnp.maximum(newest - jnp.arange(config.slots - 1, -1, -1), 0)
        state, _, windows = watched_step(
            params, model, config, state, tokens, jnp.broadcast_to(active, tokens.shape), _window
        )
        first = tuple(
            jnp.concatenate([older, window.q[:, -1:]], 1) for older, window in zip(past, windows, strict=True)
        )
        by_layer = [
            _compare(layer.pages, *of_layer, positions, slots)
            for layer, *of_layer in zip(
                itertools.compress(state.layers, sparse), windows, first, full, strict=True
            )
        ]
        return (state, tuple(q[:, 1:] for q in first)), jax.tree.map(lambda *x: jnp.stack(x), *by_layer)

    (state, past), found = lax.scan(step, (state, past), (tokens, active))
    return state, past, found


def _by_token(values: Float[np.ndarray, "steps L B ages"], ages: Sequence[int], tokens: int):
    """[ages, L, B, T]: of what each step saw at some ages, what each of the first tokens was then."""
    return np.stack(
        [np.moveaxis(values[age : age + tokens, ..., place], 0, -1) for place, age in enumerate(ages)]
    )


@under_mesh_of_weights
def full_attentions(model: Model, texts: Texts, sparse_layers: Sequence[int]) -> tuple[FullAttention, ...]:
    """Returns full attention's keys, values and outputs [B, T, heads, D] of the sparse layers.

    Texts are passed one by one, so that memory grows with the square of the tokens of one.

    Raises:
      ValueError: there are none.
    """
    if not sparse_layers:
        raise ValueError(f"all {model.config.num_layers} layers are dense; lower --dense-layers")
    ids = check_token_ids(model.config, texts.ids, "token_ids")
    found = [full_attention(model.params, model.config, row[None]) for row in ids]
    return tuple(
        jax.tree.map(lambda *rows, layer=layer: jnp.concatenate([row[layer] for row in rows]), *found)
        for layer in sparse_layers
    )


@under_mesh_of_weights
def measure(
    model: Model,
    texts: Texts,
    config: DecodeConfig,
    full: Sequence[FullAttention],
    ages: Sequence[int],
    progress,
) -> Distances:
    """Decodes along the texts, and compares what is in the cache with full attention.

    Args:
      model: the model.
      texts: B of one length, decoded as one batch.
      config: how to decode; evicts nothing.
      full: of `full_attentions`, for each sparse layer.
      ages: ascending from 0; the highest is w-1 or more, and is below the number of decoded tokens.
      progress: called as tokens are done.
    """
    batch, length = texts.ids.shape
    steps, sizes = length - texts.prompt_tokens, model.config
    ids = check_token_ids(sizes, texts.ids, "token_ids")
    state = new_state(sizes, config, batch, length)
    state, _ = run_prefill(model, config, state, list(ids[:, : texts.prompt_tokens]), progress)
    none = batch, config.slots - 1, sizes.num_heads, sizes.head_dim
    past = tuple(jnp.ones(none, sizes.dtype) for _ in full)
    per_call = program_length(steps, MIN_STEPS, STEPS_PER_CALL)
    found = []
    for begin in range(0, steps, per_call):
        count = min(per_call, steps - begin)
        tokens = np.zeros((per_call, batch), np.int32)
        tokens[:count] = ids[:, texts.prompt_tokens + begin :][:, :count].T
        active = np.arange(per_call) < count
        state, past, values = _steps(
            model.params, sizes, config, tuple(ages), tuple(full), state, past, tokens, active
        )
        found.append(jax.tree.map(lambda array, count=count: np.asarray(array)[:count], values))
        progress("decode", begin + count, steps)
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    window, tokens = range(config.slots), steps - ages[-1]
    cache = {name: _by_token(getattr(joined, name), ages, tokens) for name in ("keys", "values")}
    slots = {name: getattr(joined, name)[..., ::-1] for name in ("outputs", "cosine", "norm")}
    return Distances(**cache, **{name: _by_token(part, window, tokens) for name, part in slots.items()})


@dataclass(frozen=True)
class Case:
    """What one configuration gave.

    Attributes:
      name: of its file.
      preset: that it is made of.
      config: what decoded.
      blocks: `Distances` as means of blocks of tokens.
      provenance: where it was computed.
    """

    name: str
    preset: str
    config: DecodeConfig
    blocks: Distances
    provenance: dict

    @property
    def base(self) -> tuple:
        """What it shares with the same case without a window."""
        return self.preset, self.config.sink_pages, budget_value(self.config)


class DistancesFolder(ResultFolder):
    """Cases on the same model and texts, each a file that is never overwritten."""

    kind, file = "measurement of distances", "distances.json"

    def has(self, name: str) -> bool:
        """Tells whether the case is finished."""
        return self._file(name).exists()

    def save(self, name: str, config: DecodeConfig, found: Distances, seconds: float) -> None:
        """Writes one finished case, as means of blocks."""
        self.begin()
        self._file(name).parent.mkdir(exist_ok=True)
        about = {"config": asdict(config), "seconds": seconds, "provenance": provenance()}
        arrays = {
            part.name: np.stack([
                [block_means(layer).astype(np.float32) for layer in age]
                for age in getattr(found, part.name)
            ])
            for part in fields(Distances)
        }  # fmt: skip
        contents = {**arrays, "about": json.dumps(about)}
        write_file(self._file(name), lambda stream: np.savez_compressed(stream, **contents))

    def load(self, name: str) -> Case:
        """Reads one finished case.

        Raises:
          ValueError: its file is damaged.
        """
        with reading(self._file(name)), np.load(self._file(name), allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            blocks = Distances(**{part.name: arrays[part.name] for part in fields(Distances)})
            config = DecodeConfig(**about["config"])
        return Case(name, name.rpartition("-w")[0], config, blocks, about["provenance"])

    def cases(self) -> list[Case]:
        """Reads every finished case, by preset, sink pages, budget and window."""
        found = [self.load(file.stem) for file in (self.path / "cases").glob("*.npz")]
        order = list(PRESETS)
        return sorted(found, key=lambda case: (order.index(case.preset), case.base[1:], case.config.slots))

    def _file(self, name: str) -> Path:
        return self.path / "cases" / f"{name}.npz"


def _check_reference(model: ModelConfig, texts: Texts) -> None:
    """Refuses texts of which full attention's keys, values and outputs do not fit the memory."""
    batch, tokens = texts.ids.shape
    heads = 2 * model.num_kv_heads + model.num_heads
    vectors = batch * tokens * heads * model.num_layers * model.head_dim * jnp.dtype(model.dtype).itemsize
    scores = 2 * 4 * model.num_heads * tokens * tokens
    parts = f"keys, values and outputs {gigabytes(2 * vectors)}, attention weights {gigabytes(scores)}"
    check_room(f"full attention over {batch} x {tokens} tokens", 2 * vectors + scores, parts)


class DistancesCommand(DistancesFlags):
    """The command, with its work."""

    def run(self) -> None:
        """Decodes by what the folder does not have yet, then writes and prints the result."""
        cases = self.cases()
        if self.tokens is not None:
            self.check_length(self.tokens)
        first = next(iter(cases.values()))
        known = known_identity(self, first, VARIED) | {"ages": self.ages}
        DistancesFolder.check(self.out, known, partial=True)
        model, texts = self.read(list(cases.values()), padded=False)
        self.check_length(texts.ids.shape[1])
        common = asdict(first)
        identity = {
            "model": self.model,
            "dtype": model.config.dtype,
            "texts": texts.names,
            "tokens": texts.ids.shape[1],
            "prompt_tokens": texts.prompt_tokens,
            "token_ids": digest(texts.ids),
            "ages": self.ages,
            "config": {key: value for key, value in common.items() if key not in VARIED},
        }
        folder = DistancesFolder(self.out, identity)
        missing = {name: config for name, config in cases.items() if not folder.has(name)}
        # Those of every case: they differ in what they revise only.
        sparse_layers = layer_plan(model.config, next(iter(cases.values()))).sparse_layers
        if missing:
            _check_reference(model.config, texts)
            full = full_attentions(model, texts, sparse_layers)
        for number, (name, config) in enumerate(missing.items(), 1):
            start = time.perf_counter()
            with Progress(f"{number}/{len(missing)} {name}: ") as progress:
                found = measure(model, texts, config, full, self.ages, progress)
            folder.save(name, config, found, time.perf_counter() - start)
            release()  # the next case's programs are other ones
        finished = folder.cases()
        values = summary(folder.identity, finished, sparse_layers)
        report = distances_report(values)
        write_results(folder.path, values, report, distances_pictures(values))
        self.show(values, f"{report}\nTable, JSON, picture and block means: {folder.path}")
