"""Tokens per second over many prompts: fixed batches beside sequences that come and go."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from retro_jax import DecodeConfig, Model, Request, generate, generate_many
from retro_jax.experiments.bench.throughput_command import BenchThroughputFlags
from retro_jax.experiments.io.folders import check_new, write_results
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.provenance import provenance
from retro_jax.experiments.io.tables import markdown
from retro_jax.experiments.io.text import text_tokens
from retro_jax.experiments.machine.memory import check_memory
from retro_jax.experiments.machine.programs import release
from retro_jax.presets import preset_fields
from retro_jax.sizes import cache_capacity, held_rows


@dataclass(frozen=True)
class Asked:
    """The prompts of all runs.

    Attributes:
      prompts: token ids.
      replies: tokens that each reply has.
    """

    prompts: Sequence[np.ndarray]
    replies: Sequence[int]

    @property
    def capacity(self) -> int:
        """Tokens per sequence that the cache holds."""
        pairs = zip(self.prompts, self.replies, strict=True)
        return cache_capacity(max(len(prompt) + reply for prompt, reply in pairs))

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


@dataclass(frozen=True)
class Made:
    """One run's replies: tokens, the logarithms of their probabilities, and the seconds that all took."""

    tokens: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    seconds: float


class BenchThroughput(BenchThroughputFlags):
    """The command, with its work."""

    def run(self) -> None:
        """Runs each method with each number of slots, both ways, and prints the table."""
        configs = self.configurations()
        rows = held_rows(max(self.slots))
        model = self.load(
            list(configs.values()), rows, cache_capacity(self.prompt_tokens[1] + self.reply_tokens[1])
        )
        asked = self.asked(model)
        check_memory(model.config, list(configs.values()), rows, asked.capacity, loaded=True)
        found = []
        with Progress() as progress:
            for name, config in configs.items():
                for slots in self.slots:
                    fixed = self._fixed(model, config, asked, slots)
                    many = self._many(model, config, asked, slots)
                    found.append(compared(name, slots, asked, fixed, many))
                    progress("runs", len(found), len(configs) * len(self.slots))
                release()  # the next method's programs are other ones
        values = {
            "model": self.model,
            "dtype": model.config.dtype,
            "prompts": [len(prompt) for prompt in asked.prompts],
            "replies": list(asked.replies),
            "capacity": asked.capacity,
            "configs": {name: asdict(config) for name, config in configs.items()},
            "rows": found,
            "provenance": provenance(),
        }
        report = throughput_report(values)
        if self.out is not None:
            write_results(self.out, values, report, {})
        self.show(values, report)

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
        if not self.slots or min(*self.slots, self.prompts, self.steps_per_call) < 1:
            raise ValueError("--slots, --prompts and --steps-per-call must be 1 or more")
        if not self.methods and not self.presets:
            raise ValueError("there is nothing to measure; name --methods or --presets")
        for path in self.text:
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}")
        configs = {name: self.config.config(method=name) for name in self.methods}
        return configs | {
            f"preset {name}": self.config.config(**preset_fields(name)) for name in self.presets
        }

    def asked(self, model: Model) -> Asked:
        """The prompts.

        Raises:
          ValueError: a text is too short for the longest, or the model has no tokenizer for it.
        """
        rng = np.random.default_rng(self.seed)
        if self.text:
            if model.tokenizer is None:
                raise ValueError(f"{self.model} has no tokenizer; leave --text out, for random tokens")
            ids = np.concatenate([text_tokens(model, [path], None)[0] for path in self.text])
        else:
            ids = rng.integers(
                model.config.vocab_size, size=self.prompts * self.prompt_tokens[1], dtype=np.int32
            )
        if len(ids) < self.prompt_tokens[1]:
            raise ValueError(
                f"--text has {len(ids)} tokens, fewer than --prompt-tokens {self.prompt_tokens[1]}"
            )
        lengths, replies = (
            spread(rng, *limits, self.prompts) for limits in (self.prompt_tokens, self.reply_tokens)
        )
        starts = [int(rng.integers(len(ids) - length + 1)) for length in lengths]
        prompts = [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        return Asked(prompts, replies)

    def _fixed(self, model: Model, config: DecodeConfig, asked: Asked, slots: int) -> Made:
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
            return Made([reply.tokens for reply in found], [reply.logprobs for reply in found], seconds)

        run(2)
        return run(max(asked.replies))


def spread(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    """Whole numbers from `low` to `high`, evenly on a logarithmic scale, in a random order."""
    numbers = np.rint(np.geomspace(low, high, count)).astype(int)
    return rng.permutation(numbers).tolist()


def compared(name: str, slots: int, asked: Asked, fixed: Made, many: Made) -> dict:
    """Both ways of one method beside each other, as JSON values."""
    tokens = sum(asked.replies)
    return {
        "name": name,
        "slots": slots,
        "tokens": tokens,
        "fixed_seconds": fixed.seconds,
        "many_seconds": many.seconds,
        "fixed_tokens_per_s": tokens / fixed.seconds,
        "many_tokens_per_s": tokens / many.seconds,
        "gain": fixed.seconds / many.seconds,
        "most_gain": asked.most_gain(slots),
        "parted": parted(fixed, many),
    }


def parted(fixed: Made, many: Made) -> list[dict]:
    """Replies that differ: which, after how many tokens, and how far apart the log-probabilities of both are.

    Both choose the most likely token: where they part, that distance is what rounding made of a tie.
    """
    found = []
    for index, (one, other) in enumerate(zip(fixed.tokens, many.tokens, strict=True)):
        differing = [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if differing:
            after = differing[0]
            gap = abs(fixed.logprobs[index][after] - many.logprobs[index][after])
            found.append({"reply": index, "after": after, "gap": gap})
    return found


def throughput_report(values: dict) -> str:
    """Returns the results as Markdown.

    Args:
      values: as in results.json.
    """
    prompts, replies = values["prompts"], values["replies"]
    told = (
        f"{values['model']} ({values['dtype']}) on {values['provenance']['device']}: {len(prompts)} prompts "
        f"of {min(prompts)} to {max(prompts)} tokens, replies of {min(replies)} to {max(replies)}, "
        f"{sum(replies)} tokens in all."
    )
    header = [
        "", "slots", "fixed batches (tokens/s)", "continuous (tokens/s)", "times", "by idle slots alone",
        "same replies", "largest gap where they part",
    ]  # fmt: skip
    body = [
        [
            row["name"],
            str(row["slots"]),
            f"{row['fixed_tokens_per_s']:.1f}",
            f"{row['many_tokens_per_s']:.1f}",
            f"{row['gain']:.2f}",
            f"{row['most_gain']:.2f}",
            f"{len(prompts) - len(row['parted'])} of {len(prompts)}",
            f"{max(each['gap'] for each in row['parted']):.1e}" if row["parted"] else "",
        ]
        for row in values["rows"]
    ]
    return f"{told}\n\n{markdown(header, body)}"
