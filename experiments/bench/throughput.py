"""Tokens per second over many prompts: fixed batches beside sequences that come and go.

`throughput_report` compares what is measured here, and shows it.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from retro_jax import DecodeConfig, Model, Request, generate, generate_many
from retro_jax.drafts import weight_bytes
from retro_jax.experiments.bench.bandwidth import read_bandwidth
from retro_jax.experiments.bench.throughput_command import BenchThroughputFlags
from retro_jax.experiments.bench.throughput_report import (
    Bytes,
    Made,
    compared,
    throughput_pictures,
    throughput_report,
)
from retro_jax.experiments.io.checks import check_least
from retro_jax.experiments.io.folders import check_new, write_results
from retro_jax.experiments.io.models import check_positions
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.provenance import provenance
from retro_jax.experiments.io.settings import by_distinct_name
from retro_jax.experiments.io.text import text_tokens
from retro_jax.experiments.machine.memory import check_memory
from retro_jax.experiments.machine.programs import release
from retro_jax.presets import preset_fields
from retro_jax.sizes import cache_capacity, held_rows
from retro_jax.verify import check_verify


@dataclass(frozen=True)
class Asked:
    """The prompts of all runs.

    Attributes:
      prompts: token ids.
      replies: tokens that each reply has.
      extra: tokens that the cache must have room for beyond them, as for drafts.
    """

    prompts: Sequence[np.ndarray]
    replies: Sequence[int]
    extra: int = 0

    @property
    def capacity(self) -> int:
        """Tokens per sequence that the cache holds."""
        pairs = zip(self.prompts, self.replies, strict=True)
        return cache_capacity(max(len(prompt) + reply for prompt, reply in pairs) + self.extra)

    def batches(self, size: int) -> Iterator[slice]:
        """Prompts in their order, so many at a time."""
        for start in range(0, len(self.prompts), size):
            yield slice(start, start + size)

    def most_gain(self, slots: int) -> float:
        """The gain by idle slots alone: steps of fixed batches over the fewest that could make all replies.

        These are the tokens shared among all slots, or the longest reply, which no second slot can help with.
        """
        steps = sum(max(self.replies[batch]) for batch in self.batches(slots))
        return steps / max(sum(self.replies) / slots, max(self.replies))


class BenchThroughput(BenchThroughputFlags):
    """The command, with its work."""

    def run(self) -> None:
        """Runs each method with each number of slots, both ways, and prints the table."""
        configs = self.configurations()
        rows = held_rows(max(self.slots))
        lengths = [(tokens, tokens) for tokens in self.contexts] or [self.prompt_tokens]
        longest = max(high for _, high in lengths)
        most = longest + self.reply_tokens[1] + (self.verify or 0)
        beside = f"--reply-tokens {self.reply_tokens[1]}{f' and --verify {self.verify}' * bool(self.verify)}"
        model = self.load(
            list(configs.values()),
            rows,
            cache_capacity(most),
            check=partial(
                check_positions,
                needed=most,
                flag="--contexts" if self.contexts else "--prompt-tokens",
                value=longest,
                beside=beside,
            ),
            without_tokenizer="; leave --text out, for random tokens" * bool(self.text),
        )
        asked = [self.asked(model, limits) for limits in lengths]
        capacity = max(each.capacity for each in asked)
        check_memory(model.config, list(configs.values()), rows, capacity, loaded=True)
        bytes_read = Bytes(
            weight_bytes(model.params, model.config, tokens=0),
            max(read_bandwidth(self.ceiling_bytes, calls=10, warm_up=2).values()),
        )
        found, done, total = [], 0, len(asked) * len(configs) * len(self.slots)
        with Progress() as progress:
            for number, (name, config) in itertools.product(range(len(asked)), configs.items()):
                for slots in self.slots:
                    fixed = self._fixed(model, config, asked[number], slots)
                    many = self._many(model, config, asked[number], slots)
                    row = compared(name, slots, asked[number], fixed, many, bytes_read)
                    found.append({"context": number} | row)
                    if self._verified(config):
                        fixed = self._fixed(model, config, asked[number], slots, self.verify)
                        row = compared(f"{name}, verified", slots, asked[number], fixed, None, bytes_read)
                        found.append({"context": number} | row)
                    progress("runs", (done := done + 1), total)
                release()  # the next method's programs are other ones
        values = {
            "model": self.model,
            "dtype": model.config.dtype,
            "contexts": [
                {"prompts": [len(prompt) for prompt in each.prompts], "capacity": each.capacity}
                for each in asked
            ],
            "replies": list(asked[0].replies),
            "configs": {name: asdict(config) for name, config in configs.items()},
            "verify": self.verify,
            "weight_bytes": bytes_read.weights,
            "ceiling_gb_per_s": bytes_read.gb_per_s,
            "rows": found,
            "provenance": provenance(),
        }
        report = throughput_report(values)
        if self.out is not None:
            write_results(self.out, values, report, throughput_pictures(values))
        self.show(values, report)

    def _verified(self, config: DecodeConfig) -> bool:
        """Whether its verified decoding is measured too."""
        return self.verify is not None and not config.attention.dense

    def configurations(self) -> dict[str, DecodeConfig]:
        """How to decode, by name.

        Raises:
          FileNotFoundError: a text is not there.
          ValueError: a flag is out of its range, or two contradict each other.
        """
        check_new(self.out)
        for name in ("prompt_tokens", "reply_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"--{name.replace('_', '-')} {low} {high} must rise from 1 or more")
        check_least(slots=self.slots, prompts=self.prompts, steps_per_call=self.steps_per_call)
        check_least(
            ceiling_bytes=self.ceiling_bytes, **({"contexts": self.contexts} if self.contexts else {})
        )
        check_least(0, seed=self.seed)
        if not self.methods and not self.presets:
            raise ValueError("there is nothing to measure; name --methods or --presets")
        for path in self.text:
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}")
        methods = {name: {"method": name} for name in self.methods}
        methods |= {f"preset {name}": preset_fields(name) for name in self.presets}
        configs = by_distinct_name(self.config.configs(methods).values())
        for config in configs.values():
            if self._verified(config):
                check_verify(config, self.verify)
        return configs

    def asked(self, model: Model, limits: tuple[int, int]) -> Asked:
        """The prompts, of least and most so many tokens.

        Raises:
          ValueError: a text is too short for the longest, or the model has no tokenizer for it.
        """
        rng = np.random.default_rng(self.seed)
        replies, lengths = (spread(rng, *each, self.prompts) for each in (self.reply_tokens, limits))
        if self.text:
            ids = np.concatenate([text_tokens(model, [path], None)[0] for path in self.text])
        else:
            ids = rng.integers(model.config.vocab_size, size=self.prompts * limits[1], dtype=np.int32)
        if len(ids) < limits[1]:
            raise ValueError(f"--text has {len(ids)} tokens, fewer than a prompt's {limits[1]}")
        starts = [int(rng.integers(len(ids) - length + 1)) for length in lengths]
        prompts = [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        return Asked(prompts, replies, self.verify or 0)

    def _fixed(
        self, model: Model, config: DecodeConfig, asked: Asked, slots: int, verify: int | None = None
    ) -> Made:
        """Batches of `slots`, each as long as its longest reply; of the others, what was asked for."""

        def run(longest: int) -> Made:
            tokens, logprobs, start = [], [], time.perf_counter()
            for batch in asked.batches(slots):
                replies = asked.replies[batch]
                made = generate(
                    model,
                    asked.prompts[batch],
                    config,
                    min(max(replies), longest),
                    stop_tokens=[],
                    capacity=asked.capacity,
                    steps_per_call=self.steps_per_call,
                    verify=verify,
                )
                for own, likely, count in zip(made.tokens, made.logprobs, replies, strict=True):
                    tokens.append(own[:count])
                    logprobs.append(likely[:count])
            return Made(tokens, logprobs, time.perf_counter() - start)

        run(2)
        return run(max(asked.replies))

    def _many(self, model: Model, config: DecodeConfig, asked: Asked, slots: int) -> Made:
        """Sequences that come and go."""

        def run(longest: int) -> Made:
            requests = [
                Request(prompt, min(count, longest))
                for prompt, count in zip(asked.prompts, asked.replies, strict=True)
            ]
            start = time.perf_counter()
            found = list(
                generate_many(
                    model,
                    requests,
                    config,
                    longest,
                    slots=slots,
                    stop_tokens=[],
                    capacity=asked.capacity,
                    steps_per_call=self.steps_per_call,
                )
            )
            seconds = time.perf_counter() - start
            found.sort(key=lambda reply: reply.index)
            return Made(
                [reply.tokens for reply in found],
                [reply.logprobs for reply in found],
                seconds,
                float(sum(reply.metrics.kv_bytes.sum() for reply in found if reply.metrics)),
            )

        run(2)
        return run(max(asked.replies))


def spread(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    """Whole numbers from `low` to `high`, evenly on a logarithmic scale, in a random order."""
    numbers = np.rint(np.geomspace(low, high, count)).astype(int)
    return rng.permutation(numbers).tolist()
