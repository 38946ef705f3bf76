"""Verified decoding beside full attention: tokens per second, acceptance, and what its parts take.

All runs begin with the same context (`verify_context`).
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from retro_jax import (
    Acceptance,
    DecodeConfig,
    DecodeState,
    Model,
    VerifiedMetrics,
    decode,
    decode_step,
    verified_decode,
    verified_step,
)
from retro_jax.budget import largest
from retro_jax.drafts import weight_bytes
from retro_jax.experiments.bench.verify_command import BenchVerifyFlags
from retro_jax.experiments.bench.verify_context import Context, read_context, unread_context
from retro_jax.experiments.bench.verify_report import verify_report
from retro_jax.experiments.io.budgets import budget_fields
from retro_jax.experiments.io.checks import check_least
from retro_jax.experiments.io.folders import check_new, write_results
from retro_jax.experiments.io.models import check_positions
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.provenance import provenance
from retro_jax.experiments.io.settings import distinct_names
from retro_jax.experiments.io.text import text_tokens
from retro_jax.experiments.machine.programs import release
from retro_jax.presets import preset_fields
from retro_jax.sharding import mesh_of
from retro_jax.verify import check_verify

STEPS, ROUNDS = 16, 4
"""Steps, and rounds of drafts and a check, of one timed call."""


@partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def _full_steps(params, model, config, state, tokens):
    """Greedy steps; the tokens[B, STEPS], and how far their logits are above the second best."""

    def step(carry, _):
        state, tokens = carry
        state, logits = decode_step(params, model, config, state, tokens)
        best = lax.top_k(logits, 2)[0]
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (state, tokens), (tokens, best[:, 0] - best[:, 1])

    (state, tokens), (chosen, gaps) = lax.scan(step, (state, tokens), length=STEPS)
    return state, tokens, chosen.T, gaps.T


@partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def _draft_steps(params, model, config, state, tokens):
    state, out = decode(params, model, config, state, tokens, STEPS)
    return state, out.pending


@partial(jax.jit, static_argnames=("model", "config", "k"), donate_argnames="state")
def _checks(params, model, config, state, tokens, k):
    """Rounds without drafts: dense passes of k + 1 rows, of which one holds a token."""

    def check(carry, _):
        state, out = verified_step(params, model, config, *carry, k, jnp.zeros_like(carry[1]))
        return (state, out.pending), None

    return lax.scan(check, (state, tokens), length=ROUNDS)[0]


@partial(jax.jit, static_argnames=("model", "config", "k", "adapt"), donate_argnames="state")
def _rounds(params, model, config, state, tokens, acceptance, k, adapt):
    return verified_decode(
        params, model, config, state, tokens, ROUNDS, k, acceptance=acceptance, adapt=adapt
    )


@dataclass(frozen=True)
class FullRun:
    """What full attention decoded.

    Attributes:
      tokens: of each sequence.
      gaps: how far the logit of each was above the second best.
      step_ms: of a step of the whole batch.
      kv_bytes: that a step read of each sequence.
    """

    tokens: Int[np.ndarray, "B T"]
    gaps: Float[np.ndarray, "B T"]
    step_ms: float
    kv_bytes: float

    def parted(self, emitted: Sequence[Sequence[int]]) -> list[dict]:
        """Sequences that part from these tokens: after how many, and how decided full attention was there."""
        found = []
        for row, tokens in enumerate(emitted):
            both = min(len(tokens), self.tokens.shape[1])
            differ = np.flatnonzero(np.asarray(tokens[:both]) != self.tokens[row, :both])
            if len(differ):
                at = int(differ[0])
                found.append({"sequence": row, "after": at, "gap": float(self.gaps[row, at])})
        return found


class BenchVerify(BenchVerifyFlags):
    """The command, with its work."""

    def run(self) -> None:
        """Measures, and prints the tables."""
        contestants = self.configurations()
        common = {name: getattr(self.config, name) for name in ("page_size", "cache_dtype", "implementation")}
        full = DecodeConfig("full", sink_pages=0, **common)
        capacity = self.capacity
        every = [config for configs in contestants.values() for config in configs]
        beside = f"--own-tokens {self.own_tokens}, --new-tokens {self.new_tokens}, --calls {self.calls} and "
        beside += f"--drafts {max(self.drafts)}"
        model = self.load(
            every,
            self.batch,
            capacity,
            check=partial(
                check_positions,
                needed=capacity,
                flag="--context",
                value=self.context,
                beside=beside,
            ),
            without_tokenizer="; leave --text out, for random tokens" * bool(self.text),
        )
        ids = self._ids(model)
        with Progress() as progress, jax.set_mesh(mesh_of(model.params)):
            run, rows, parts = None, [], []
            for name, configs in contestants.items():
                itemsize = jnp.dtype(model.config.dtype).itemsize
                pages = configs[0].num_pages(capacity)
                config = largest(configs, pages, model.config.head_dim, itemsize)
                context = Context(model, config, *self._context(model, config, ids, capacity, progress))
                if run is None:
                    run = self._full(model, full, context)
                more = self._parts(model, name, context)
                parts += more
                if not self.predict:
                    for part, adapt in self._modes(more):
                        rows.append(self._verified(model, part, adapt, context, run))
                del context
                release()  # the next one's programs are other ones
        values = {
            "model": self.model,
            "dtype": model.config.dtype,
            "text": [path.name for path in self.text],
            "batch": self.batch,
            "context": self.context,
            "own_tokens": self.own_tokens,
            "new_tokens": self.new_tokens,
            "configs": {
                name: [asdict(config) for config in configs] for name, configs in contestants.items()
            },
            "full": {
                "step_ms": run.step_ms,
                "tokens_per_s": self.batch / run.step_ms * 1e3,
                "kv_bytes": run.kv_bytes,
            },
            "weight_bytes": weight_bytes(model.params, model.config, self.batch),
            "parts": parts,
            "rows": rows,
            "acceptances": list(self.acceptances),
            "provenance": provenance(),
        }
        report = verify_report(values)
        if self.out is not None:
            write_results(self.out, values, report, {})
        self.show(values, report)

    @property
    def capacity(self) -> int:
        """Tokens per sequence: some sequences go on until the slowest has its tokens."""
        timed = (self.calls + 1) * max(STEPS, ROUNDS)
        return (
            self.context + self.own_tokens + max(2 * self.new_tokens, timed) + ROUNDS * (max(self.drafts) + 1)
        )

    def configurations(self) -> dict[str, list[DecodeConfig]]:
        """How to draft, at every budget, by what is compared.

        Raises:
          FileNotFoundError: a text is not there.
          ValueError: a flag is out of its range, or the method cannot draft.
        """
        check_new(self.out)
        for name in ("budgets", "drafts", "acceptances"):
            if not getattr(self, name):
                raise ValueError(f"--{name} needs at least one value")
        if not self.methods and not self.presets:
            raise ValueError("there is nothing that drafts; name --methods or --presets")
        for name in ("batch", "context", "own_tokens", "new_tokens", "calls"):
            check_least(**{name: getattr(self, name)})
        for path in self.text:
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}")
        for share in self.acceptances:
            if not 0 <= share <= 1:
                raise ValueError(f"--acceptances has {share}; it must be in 0..1")
        fields = {name: {"method": name} for name in self.methods}
        fields |= {f"preset {name}": dict(preset_fields(name)) for name in self.presets}
        by_budget = [
            list(self.config.configs({name: own | more for name, own in fields.items()}).values())
            for more in map(budget_fields, self.budgets)
        ]
        names = distinct_names(by_budget[0], told=("budget", "budget_tokens"))  # which have a column
        found = {name: list(configs) for name, *configs in zip(names, *by_budget, strict=True)}
        for config, k in itertools.product(itertools.chain(*found.values()), self.drafts):
            check_verify(config, k, self.capacity)
        return found

    def _modes(self, parts: Sequence[dict]) -> list[tuple[dict, bool]]:
        """The budgets and drafts that run, and whether their drafts adapt."""
        most = [(part, True) for part in parts if part["drafts"] == max(self.drafts)]
        return [(part, False) for part in parts] + most * self.adapt

    def _context(
        self,
        model: Model,
        config: DecodeConfig,
        ids: tuple[np.ndarray, np.ndarray] | None,
        capacity: int,
        progress: Callable[[str, int, int], None],
    ) -> tuple[DecodeState, Int[jax.Array, " B"]]:
        if ids is None:
            return unread_context(model, config, self.context + self.own_tokens, self.batch, capacity)
        return read_context(model, config, *ids, capacity, progress)

    def _ids(self, model: Model) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, "B T"]] | None:
        """The tokens that all sequences share, and those of each; None if none have to be read."""
        if self.predict and not self.text:
            return None
        needed = self.context + self.batch * self.own_tokens
        if self.text:
            ids = np.concatenate([text_tokens(model, [path], None)[0] for path in self.text])
            if len(ids) < needed:
                raise ValueError(
                    f"--text has {len(ids)} tokens, fewer than the {needed} of --context and, for each of "
                    f"{self.batch} sequences, --own-tokens; give more files, or lower them"
                )
        else:
            ids = np.random.default_rng(self.seed).integers(model.config.vocab_size, size=needed)
        shared, own = np.split(ids[:needed].astype(np.int32), [self.context])
        return shared, own.reshape(self.batch, self.own_tokens)

    def _full(self, model: Model, config: DecodeConfig, context: Context) -> FullRun:
        params, sizes = model.params, model.config
        first = _full_steps(params, sizes, config, context.begin_full(config), context.tokens)  # compiles
        context.end(first[0])
        state, tokens, found, seconds, read = context.begin_full(config), context.tokens, [], [], []
        calls = self.calls if self.predict else -(-self.new_tokens // STEPS)
        for _ in range(calls):
            (state, tokens, *chosen), took = timed(_full_steps, params, sizes, config, state, tokens)
            found.append(jax.tree.map(np.asarray, chosen))
            read.append(float(jnp.mean(state.metrics.kv_bytes)))
            seconds.append(took)
        context.end(state)
        chosen, gaps = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
        return FullRun(chosen, gaps, float(np.median(seconds)) / STEPS * 1e3, float(np.mean(read)))

    def _parts(self, model: Model, name: str, context: Context) -> list[dict]:
        """What a draft step takes at each budget, and a check of each number of drafts."""
        arguments = model.params, model.config, context.config
        numbers = list(dict.fromkeys(self.drafts))
        checks = [self._each(context, self.budgets[0], _checks, *arguments, k=k) / ROUNDS for k in numbers]
        found = []
        for budget in dict.fromkeys(self.budgets):
            step = self._each(context, budget, _draft_steps, *arguments) / STEPS
            found += [
                {"name": name, "budget": budget, "drafts": k, "draft_step_ms": step, "check_ms": check}
                for k, check in zip(numbers, checks, strict=True)
            ]
        return found

    def _each(self, context: Context, budget: float, run: Callable, *arguments, **options) -> float:
        """The median milliseconds of a call, the first of which compiles."""
        state, tokens, seconds = context.begin(budget), context.tokens, []
        for _ in range(self.calls + 1):
            (state, tokens), took = timed(run, *arguments, state, tokens, **options)
            seconds.append(took)
        context.end(state)
        return float(np.median(seconds[1:])) * 1e3

    def _verified(self, model: Model, part: dict, adapt: bool, context: Context, full: FullRun) -> dict:
        """One run of verified decoding, as JSON values."""
        k, unknown = part["drafts"], Acceptance.unknown(self.batch)
        run = partial(_rounds, model.params, model.config, context.config, k=k, adapt=adapt)
        context.end(run(context.begin(part["budget"]), context.tokens, unknown)[0])  # compiles
        state, tokens, known = context.begin(part["budget"]), context.tokens, unknown
        emitted, metrics, seconds = [[] for _ in range(self.batch)], [], []
        while min(map(len, emitted)) < self.new_tokens and _room(model, state) >= ROUNDS * (k + 1):
            (state, out), took = timed(run, state, tokens, known)
            tokens, known = out.pending, out.acceptance
            for row, chosen, kept in zip(
                emitted, np.asarray(out.tokens), np.asarray(out.emitted), strict=True
            ):
                row += chosen[kept].tolist()
            metrics.append(out.metrics)
            seconds.append(took)
        context.end(state)
        told = VerifiedMetrics.gather(metrics).summary()
        rate = sum(map(len, emitted)) / sum(seconds)
        round_ms = sum(seconds) / (len(seconds) * ROUNDS) * 1e3
        passes = self.batch, self.batch * (told["drafts_per_check"] + 1)
        weights, of_check = (weight_bytes(model.params, model.config, tokens) for tokens in passes)
        read = weights * told["drafts_per_check"] + of_check
        read += self.batch * (told["draft_bytes_per_check"] + told["check_bytes_per_check"])
        parted = full.parted(emitted)
        return {
            **part,
            "adapted": adapt,
            "tokens_per_s": rate,
            "over_full": rate * full.step_ms / 1e3 / self.batch,
            "over_full_by_bytes": told["tokens_per_check"] * (weights + self.batch * full.kv_bytes) / read,
            "round_ms": round_ms,
            "draft_share": 1 - part["check_ms"] / round_ms,
            **told,
            "same_sequences": self.batch - len(parted),
            "parted": parted,
            "seconds": seconds,
        }


def _room(model: Model, state: DecodeState) -> int:
    """Tokens that every sequence can still take."""
    return int(jnp.min(state.room(model.config)))


def timed(call: Callable, *arguments, **options) -> tuple[Any, float]:
    """What a call returns once it is computed, and its seconds."""
    start = time.perf_counter()
    out = jax.block_until_ready(call(*arguments, **options))
    return out, time.perf_counter() - start
