"""Who takes turns in `bench decode`: what a contestant is, and the methods of this library as such."""

import functools
import time
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.settings import under_fixed_settings
from retro_jax import DecodeConfig, Model, decode, decode_step
from retro_jax.cache import LayerState
from retro_jax.compilation import JitForMesh
from retro_jax.experiments.bench.device_time import Executed, executed
from retro_jax.experiments.bench.kernel_cases import normal
from retro_jax.heads import write_heads, write_ring_heads
from retro_jax.layers import settle
from retro_jax.models.config import LayerKind, ModelConfig
from retro_jax.models.transformer import LayerParams
from retro_jax.plan import layer_plan
from retro_jax.prompts import run_prefill
from retro_jax.sharding import new_state, to_host
from retro_jax.state import DecodeState


class Contestant(Protocol):
    """Something that decodes greedily from a context.

    Attributes:
        name: for the table.
        scan: decodes so many steps in one call; returns the milliseconds of one. None: it cannot, nor then
            `executed`.
    """

    name: str
    scan: Callable[[int], float] | None

    @property
    def kv_bytes(self) -> float | None:
        """Bytes of keys, values and page statistics that a step reads for a sequence; None: not known."""
        ...

    @property
    def expert_bytes(self) -> float | None:
        """Bytes of experts' weights that a step reads for all sequences; None: not known, or none."""
        ...

    def steps(self, count: int) -> tuple[list[float], list[list[int]]]:
        """Decodes so many steps; returns each one's milliseconds and tokens (one per sequence)."""
        ...

    def executed(self, count: int) -> Executed | None:
        """What the device executes in a step of a scan of so many; None where it does not say."""
        ...


def _greedy(params, model, config, state, tokens):
    state, logits = decode_step(params, model, config, state, tokens)
    return state, jnp.argmax(logits, -1).astype(jnp.int32)


_step = JitForMesh(_greedy, static_argnames=("model", "config"), donate_argnames="state")
_scan = JitForMesh(decode, static_argnames=("model", "config", "steps"), donate_argnames="state")


class Ours:
    """One method of this library.

    Args:
        name: for the table.
        model: the model.
        config: how to decode.
        ids: the context.
        capacity: tokens that the cache holds.
        prefill: whether the context's keys and values are computed; else they are noise.
        progress: told about the prefill.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        config: DecodeConfig,
        ids: Int[np.ndarray, "B T"],
        capacity: int,
        prefill: bool,
        progress: Callable[[str, int, int], None],
    ):
        self.name, self._model, self._config = name, model, config
        if prefill:
            state = new_state(model.config, config, len(ids), capacity)
            self._state, logits = run_prefill(
                model, config, state, list(ids), lambda stage, *counts: progress(f"{name}: {stage}", *counts)
            )
            tokens = jnp.argmax(logits, -1).astype(jnp.int32)
        else:
            self._state, tokens = noise_state(model, config, *ids.shape, capacity), jnp.asarray(ids[:, -1])
        self._tokens = jax.block_until_ready(tokens)

    @property
    def kv_bytes(self) -> float:
        """As `Contestant`, of the latest step."""
        return float(np.mean(to_host(self._state.metrics.kv_bytes)))

    @property
    def expert_bytes(self) -> float | None:
        """As `Contestant`, of the latest step."""
        read = self._state.metrics.expert_bytes
        return None if read is None else float(np.sum(to_host(read)))

    def steps(self, count: int) -> tuple[list[float], list[list[int]]]:
        """As `Contestant`."""
        milliseconds, tokens = [], []
        for _ in range(count):
            start = time.perf_counter()
            self._state, self._tokens = _step(
                self._model.params, self._model.config, self._config, self._state, self._tokens
            )
            values = to_host(self._tokens)
            milliseconds.append((time.perf_counter() - start) * 1e3)
            tokens.append(values.tolist())
        return milliseconds, tokens

    def scan(self, count: int) -> float:
        """As `Contestant`; the first call of a count compiles it."""
        start = time.perf_counter()
        self._state, decoded = _scan(
            self._model.params, self._model.config, self._config, self._state, self._tokens, steps=count
        )
        self._tokens = jax.block_until_ready(decoded.pending)
        return (time.perf_counter() - start) * 1e3 / count

    def executed(self, count: int) -> Executed | None:
        """As `Contestant`, where the count has been scanned before."""
        return executed(lambda _: self.scan(count), calls=1, parts=count)


NOISE_TOKENS = 512
"""Tokens of each sequence that are written at once."""


@functools.partial(
    JitForMesh,
    static_argnames=("kind", "ring", "model", "config", "batch", "context"),
    donate_argnames="cache",
)
@under_fixed_settings
def _noise_layer(
    layer: LayerParams,
    cache: LayerState,
    key: Array,
    kind: LayerKind,
    ring: int | None,
    model: ModelConfig,
    config: DecodeConfig,
    *,
    batch: int,
    context: int,
) -> LayerState:
    held = context if ring is None else min(ring, context)
    chunk = min(NOISE_TOKENS, held)

    def write(index, cache):
        first = context - held + index * chunk
        positions = jnp.broadcast_to(first + jnp.arange(chunk), (batch, chunk))
        start, valid = positions[:, 0], positions < context
        h = normal(jax.random.fold_in(key, index), (batch, chunk, model.width), model.dtype)
        if ring is not None:
            tokens = cache.pages, h, positions, start, valid
            return cache.replace(pages=write_ring_heads(layer, model, kind, ring, *tokens, "xla")[1])
        cache = write_heads(layer, model, kind, config, cache, h, positions, start, valid, "xla")[1]
        if cache.block_values is None:
            return cache
        settled = start + jnp.sum(valid, axis=1)
        size = config.residual_pages * config.page_size
        return settle(config, cache, start, settled, chunk + size)

    return jax.lax.fori_loop(0, -(-held // chunk), write, cache)


def noise_state(model: Model, config: DecodeConfig, batch: int, context: int, capacity: int) -> DecodeState:
    """A state with a context of noise: keys and values are those of random hidden states, in every layer.

    It is decoded as fast as one of text, but that similar tokens may choose fewer experts and similar scores
    take longer to choose among, and takes a product a layer to make instead of a prefill.

    Args:
        model: its weights on their devices.
        config: how it will be decoded, by a method that does not evict.
        batch: B, sequences.
        context: tokens of each.
        capacity: tokens of each that there is room for.
    """
    state = new_state(model.config, config, batch, capacity)
    layers = [
        _noise_layer(*layer, model.config, config, batch=batch, context=context)
        for layer in zip(
            model.params.layers,
            state.layers,
            jax.random.split(jax.random.key(0), model.config.num_layers),
            model.config.layers,
            layer_plan(model.config, config).rings,
            strict=True,
        )
    ]
    return state.replace(length=jnp.full_like(state.length, context), layers=tuple(layers))
