"""The loop that trains a learned score: chunks in a fixed order, checkpoints, and what is measured aside."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Int
from orbax.checkpoint import checkpoint_managers

from retro_jax.experiments.learn.distill import Selected, dense_layer, loss_and_gradient, recalls
from retro_jax.learned import initial_score
from retro_jax.models import LearnedScore, Model, ModelConfig, transformer

RECALLS = ("recall", "exact", "mean_key")
"""What is measured on held-out chunks: the share of attention on as many pages as a budget has, chosen by the
score, by exact attention, which is the most, and by mean keys."""
WARM_UP, LAST_RATE, LARGEST_NORM = 0.05, 0.05, 1.0
"""The share of steps that warm up, the last rate as a share of the highest, and the norm of gradients."""
HELD_OUT_AT_ONCE = 8
"""Held-out chunks that are measured, at most: the first of so many equal parts."""


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
      page_size: S.
      channels: d.
      steps: chunks that are trained on, the same ones again when all had their turn.
      queries: of each chunk and layer that count, drawn anew in each step.
      learning_rate: the highest.
      evaluate_every: steps between two measurements, each of which is followed by a checkpoint.
      selected_pages: where recall is measured.
      seed: of the order of chunks and of the queries.
    """

    page_size: int
    channels: int
    steps: int
    queries: int
    learning_rate: float
    evaluate_every: int
    selected_pages: int
    seed: int

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW under a warm-up and a cosine, with clipped gradients."""
        rate = optax.warmup_cosine_decay_schedule(
            0.0,
            self.learning_rate,
            max(1, round(WARM_UP * self.steps)),
            max(2, self.steps),
            LAST_RATE * self.learning_rate,
        )
        return optax.chain(optax.clip_by_global_norm(LARGEST_NORM), optax.adamw(rate, weight_decay=0.0))

    def chunk(self, step: int, chunks: int) -> int:
        """Which of so many chunks a step trains on: all in a shuffled order, then all in another."""
        turn, place = divmod(step, chunks)
        return int(np.random.default_rng((self.seed, 0, turn)).permutation(chunks)[place])

    def positions(self, step: int, tokens: int) -> Int[np.ndarray, " Q"]:
        """The queries of a chunk that count in a step: any behind its first page."""
        behind = np.arange(self.page_size, tokens)
        drawn = np.random.default_rng((self.seed, 1, step)).permutation(behind)
        return np.sort(drawn[: self.queries]).astype(np.int32)


@flax.struct.dataclass
class Training:
    """What a checkpoint holds: all that later steps depend on.

    Attributes:
      scores: of each layer.
      moments: the optimizer's state.
    """

    scores: tuple[LearnedScore, ...]
    moments: optax.OptState


def check_learnable(model: ModelConfig) -> None:
    """Raises ValueError if a model has layers that no score is trained for."""
    for index, kind in enumerate(model.layers):
        partial = kind.rope is not None and (kind.rope.channels or model.head_dim) < model.head_dim
        for part, found in (("a partial rotary embedding", partial), ("sinks", kind.sinks)):
            if found:
                raise ValueError(
                    f"layer {index} of {model.name} has {part}, for which no score is trained; use preset "
                    "mean-key, or another model"
                )


def layers_of_chunk(model: Model, tokens: Int[np.ndarray, " T"]) -> Iterator[tuple[int, Array, Array]]:
    """Each layer's number, queries and keys of a chunk, by full attention; one layer at a time."""
    x = transformer.embed(model.params, model.config, jnp.asarray(tokens)[None])[0]
    for index, (layer, kind) in enumerate(zip(model.params.layers, model.config.layers, strict=True)):
        layer = layer.replace(page_score=None)
        x, q, k = dense_layer(layer, model.config, kind, x)
        yield index, q, k


def begin(model: Model, plan: Plan, tokens: Int[np.ndarray, " T"]) -> Training:
    """What training begins with, of the channels by which the pages of a chunk differ."""
    kinds, start = model.config.layers, jax.jit(initial_score, static_argnums=(0, 1, 4, 5))
    scores = tuple(
        start(model.config, kinds[index], q, k, plan.page_size, plan.channels)
        for index, q, k in layers_of_chunk(model, tokens)
    )
    return Training(scores, plan.optimizer().init(scores))


def train_step(
    model: Model, plan: Plan, training: Training, tokens: Int[np.ndarray, " T"], at: Int[np.ndarray, " Q"]
) -> tuple[Training, Array]:
    """One chunk; returns what was trained, and the mean divergence of its layers before."""
    losses, gradients = [], []
    for index, q, k in layers_of_chunk(model, tokens):
        kind = model.config.layers[index]
        loss, gradient = loss_and_gradient(training.scores[index], model.config, kind, q, k, at)
        losses.append(loss)
        gradients.append(gradient)
    return _update(plan)(training, tuple(gradients)), jnp.mean(jnp.stack(losses))


@functools.cache
def _update(plan: Plan) -> Callable[[Training, tuple[LearnedScore, ...]], Training]:
    """The optimizer's step, compiled once."""
    optimizer = plan.optimizer()

    @jax.jit
    def update(training, gradients):
        changes, moments = optimizer.update(gradients, training.moments, training.scores)
        return Training(optax.apply_updates(training.scores, changes), moments)

    return update


def held_out_recalls(
    model: Model, plan: Plan, scores: tuple[LearnedScore, ...], chunks: Int[np.ndarray, "n T"]
) -> dict[str, float]:
    """`RECALLS` on some of the held-out chunks, over as many queries of each as a step has, evenly spaced.

    The queries are those of the latter half of a chunk.
    """
    T = chunks.shape[1]
    at = np.unique(np.linspace(max(T // 2, plan.page_size), T - 1, plan.queries).astype(np.int32))
    selected = Selected(plan.page_size, plan.selected_pages)
    found = []
    for tokens in chunks[:: -(-len(chunks) // HELD_OUT_AT_ONCE)]:
        for index, q, k in layers_of_chunk(model, tokens):
            found.append(recalls(scores[index], model.config, model.config.layers[index], q, k, at, selected))
    return dict(zip(RECALLS, np.mean(np.array(found, np.float64), axis=0).tolist(), strict=True))


@contextlib.contextmanager
def checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a folder: the last one, and the one of the best held-out recall."""
    policy = checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["recall"],
        preservation_policy=policy.AnyPreservationPolicy(
            [policy.LatestN(1), policy.BestN(get_metric_fn=lambda metrics: metrics["recall"], n=1)]
        ),
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
    )
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Within it the threads of orbax do not log what they raise: who waits for them is told it again."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def restore(manager: ocp.CheckpointManager, step: int, like: Training) -> Training:
    """What a checkpoint holds.

    Args:
      manager: of `checkpoints`.
      step: one of its steps.
      like: a training of the same shapes.

    Raises:
      ValueError: the checkpoint is damaged, or of other shapes.
    """
    try:
        with _no_tracebacks():
            return manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(_shape, like)))
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the checkpoint of step {step} in {manager.directory} is damaged ({reason}); remove its folder, "
            "and the same command goes on from the one before, or from the beginning"
        ) from error


def _shape(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def save(manager: ocp.CheckpointManager, step: int, training: Training, metrics: dict[str, float]) -> None:
    """Writes a checkpoint; one that is not whole is never found again.

    Raises:
      OSError: it could not be written, such as on a full disk.
    """
    last = manager.latest_step()
    try:
        with _no_tracebacks():
            manager.save(step, args=ocp.args.StandardSave(training), metrics=metrics)
            manager.wait_until_finished()
    except Exception as error:  # tensorstore raises ValueError where a disk is full
        kept = "there is none before" if last is None else f"that of step {last} is whole"
        full = "No space left" in str(error)  # else in words of a library, which calls it a lack of resources
        reason = "the disk is full" if full else " ".join(str(error).split())[:300]
        raise OSError(
            f"the checkpoint of step {step} could not be written into {manager.directory} "
            f"({reason}); {kept}: make room there, and the same command goes on"
        ) from error


def train(
    model: Model,
    plan: Plan,
    chunks: Int[np.ndarray, "n T"],
    held_out: Int[np.ndarray, "m T"],
    manager: ocp.CheckpointManager,
    progress: Callable[[str, int, int], None],
    told: Callable[[dict], None],
) -> Training:
    """Trains from the last checkpoint on, or from the beginning; returns what the last step left.

    What a step computes depends on its number and on the step before only, so that a run that was stopped,
    wherever, comes to the same scores as one that was not.

    Args:
      model: the teacher.
      plan: how.
      chunks: to train on.
      held_out: to measure on.
      manager: of `checkpoints`.
      progress: called after each step.
      told: called with what was measured at each checkpoint, as JSON values.

    Raises:
      OSError: a checkpoint could not be written.
      ValueError: the last one is damaged.
      FloatingPointError: the divergence is not finite.
    """
    first = manager.latest_step() or 0
    training = begin(model, plan, chunks[plan.chunk(0, len(chunks))])
    if first:
        training = restore(manager, first, training)
    losses = []
    for step in range(first, plan.steps):
        tokens, at = chunks[plan.chunk(step, len(chunks))], plan.positions(step, chunks.shape[1])
        training, loss = train_step(model, plan, training, tokens, at)
        losses.append(loss)
        done = step + 1
        progress("learn", done, plan.steps)
        if done % plan.evaluate_every and done < plan.steps:
            continue
        loss = float(np.mean(jax.device_get(losses)))
        losses = []
        if not np.isfinite(loss):
            raise FloatingPointError(f"the divergence is {loss} at step {done}; lower --learning-rate")
        measured = held_out_recalls(model, plan, training.scores, held_out)
        save(manager, done, training, measured)
        told({"step": done, "divergence": loss, **measured})
    return training
