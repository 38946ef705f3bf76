"""Everything that decoding carries from step to step, as one pytree."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import STATISTICS, QuantizedPages, empty_pages
from pallas_kernels.dispatch import SEQUENCES
from pallas_kernels.settings import under_fixed_settings
from retro_jax.budget import Budget, rules_of, statistics_width
from retro_jax.cache import LayerState, OutputCache, Stale, StepMetrics, spread
from retro_jax.config import DecodeConfig
from retro_jax.models.config import ModelConfig
from retro_jax.models.fingerprint import named_arrays
from retro_jax.plan import layer_plan


@flax.struct.dataclass
class DecodeState:
    """The state of a batch of sequences.

    Attributes:
      length: tokens in the cache; also the position of the next token.
      budget: what a step may load.
      decoded: tokens decoded since the last prompt, at most W-1: how many older slots of the window are
        valid. Prompt tokens had full attention and never enter the window.
      hidden: hidden states of the last W-1 tokens as the dense layers left them, oldest first.
      layers: the cache, one entry per layer.
      metrics: what the latest step did.
      capacity: tokens per sequence that there is room for; static.
      stale: what the next rectification rewrites; None for a configuration without.
    """

    length: Int[Array, " B"] = spread(SEQUENCES)
    budget: Budget
    decoded: Int[Array, " B"] = spread(SEQUENCES)
    hidden: Float[Array, "B older M"] = spread(SEQUENCES)
    layers: tuple[LayerState, ...]
    metrics: StepMetrics
    capacity: int = flax.struct.field(pytree_node=False)
    stale: Stale | None = None

    def __repr__(self) -> str:
        """Without its arrays."""
        rows, layers = self.length.shape[0], len(self.layers)
        return f"DecodeState({rows} sequences, {layers} layers, {self.capacity} tokens)"

    def room(self, model: ModelConfig) -> Int[Array, " B"]:
        """Tokens that each sequence can still take: up to the capacity, or to the model's last position."""
        return min(self.capacity, model.max_positions) - self.length

    def check_made_by(self, model: ModelConfig, config: DecodeConfig) -> None:
        """Raises ValueError if the arrays are not those of a state of the configuration."""
        pages = self.layers[0].pages
        kept = pages.dtype.name if isinstance(pages, QuantizedPages) else None
        for name, given, has in (
            ("page_size", config.page_size, pages.shape[4]),
            ("cache_dtype", config.cache_dtype, kept),
        ):
            if given != has:
                raise ValueError(
                    f"{name} is {given!r}, but the state was made with {has!r}; use the configuration that "
                    "it was made with"
                )
        found = _arrays_in_words(self)
        expected = _expected(model, config, self.length.shape[0], min(self.capacity, model.max_positions))
        different = [
            f"{name} is {found.get(name, 'missing')}, not {expected.get(name, 'there')}"
            for name in {**expected, **found}
            if found.get(name) != expected.get(name)
        ]
        if different:
            more = f", and {len(different) - 1} more" * (len(different) > 1)
            raise ValueError(
                f"the state was made with another configuration or model ({different[0]}{more}); use those "
                "that it was made with"
            )


def _arrays_in_words(state: DecodeState) -> dict[str, str]:
    return {name: f"{array.dtype.name}{list(array.shape)}" for name, array in named_arrays(state).items()}


@functools.cache
def _expected(model: ModelConfig, config: DecodeConfig, batch: int, capacity: int) -> dict[str, str]:
    return _arrays_in_words(jax.eval_shape(functools.partial(init_state, model, config, batch, capacity)))


@under_fixed_settings
def init_state(model: ModelConfig, config: DecodeConfig, batch: int, capacity: int) -> DecodeState:
    """An empty state.

    Args:
      model: the model that will decode.
      config: how.
      batch: B, sequences.
      capacity: tokens per sequence that the cache must hold; rounded up to a multiple of 8 pages.

    Raises:
      ValueError: the batch is empty, or the capacity is not within 1..`model.max_positions`.
    """
    if batch < 1:
        raise ValueError(f"batch {batch} is below 1")
    if not 1 <= capacity <= model.max_positions:
        raise ValueError(
            f"capacity {capacity} is not within 1..{model.max_positions}, the positions of {model.name}; "
            "shorten the prompt or generate fewer tokens"
        )
    plan = layer_plan(model, config)
    B, K, N, D = batch, model.num_kv_heads, model.num_heads, model.head_dim
    P = config.num_pages(capacity)
    rules = rules_of(config, P, D, jnp.dtype(model.dtype).itemsize)

    def layer(sparse: bool, anchor: bool, window: int, ring: int | None) -> LayerState:
        held = P if ring is None else min(P, config.num_pages(ring))
        pages = empty_pages((B, K, held, 2, config.page_size, D), config.cache_dtype or model.dtype)
        if not sparse:
            return LayerState(pages)
        statistics = block_values = None
        if config.kept_statistics and anchor:
            width = statistics_width(config, D)
            statistics = STATISTICS[config.kept_statistics].zeros((B, K, P), width, model.dtype)
        if config.residual_pages:
            block_values = jnp.zeros((B, K, -(-P // config.residual_pages), D), model.dtype)
        return LayerState(
            pages=pages,
            statistics=statistics,
            block_values=block_values,
            last_loaded=jnp.full((B, K, P), -1, jnp.int32),
            outputs=OutputCache(
                o=jnp.zeros((B, window - 1, N, D), jnp.float32),
                lse=jnp.full((B, window - 1, N), -jnp.inf, jnp.float32),
            ),
            kept=config.eviction.init(rules, model, B, P) if config.eviction else None,
        )

    return DecodeState(
        length=jnp.zeros(B, jnp.int32),
        budget=Budget.of(config, B),
        decoded=jnp.zeros(B, jnp.int32),
        hidden=jnp.zeros((B, config.slots - 1, model.width), model.dtype),
        layers=tuple(map(layer, plan.sparse, plan.anchors, plan.windows, plan.rings)),
        metrics=StepMetrics(
            pages_attended=jnp.zeros((B, config.slots), jnp.float32),
            pages_loaded=jnp.zeros(B, jnp.float32),
            kv_bytes=jnp.zeros(B, jnp.float32),
            expert_bytes=None if model.experts is None else jnp.zeros(B, jnp.float32),
        ),
        capacity=P * config.page_size,
        stale=Stale(jnp.zeros((B, config.rectify_every), jnp.int32), jnp.zeros(B, jnp.int32))
        if config.rectify_every
        else None,
    )


def reset(
    model: ModelConfig, config: DecodeConfig, state: DecodeState, which: Bool[Array, " B"]
) -> DecodeState:
    """The state with some of its sequences empty again, as `init_state` leaves them.

    But for their pages: what lies there beyond a sequence's length has no meaning.
    """
    # Where pages reach beyond the model's last position, that is as many as the capacity takes.
    capacity = min(state.capacity, model.max_positions)
    empty = init_state(model, config, state.length.shape[0], capacity)
    layers = (new.replace(pages=old.pages) for new, old in zip(empty.layers, state.layers, strict=True))

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(which.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(pick, empty.replace(layers=tuple(layers)), state)
