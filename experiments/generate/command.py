"""The command `generate`: continue prompts, or chat."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import tyro

from retro_jax.experiments.io.flags import (
    Configured,
    Flag,
    OverDevices,
    SamplingArguments,
    SamplingFlags,
)
from retro_jax.experiments.io.progress import Progress, Rates

if TYPE_CHECKING:
    from retro_jax import Generation, Model
    from retro_jax.models.config import ModelConfig


@dataclass(kw_only=True)
class Generate(Configured, OverDevices):
    """Continue prompts, or chat, with full attention, Quest or RetroAttention.

    The text goes to stdout as it is generated (several prompts: when all are finished), a summary to stderr.
    Replies to --prompts go to --out, each as soon as it is finished. What --save-state keeps, --state goes on
    with, another day or on another machine.
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; give the flag again for more, which are generated as one batch."""
    prompt_file: tuple[Path, ...] = ()
    """UTF-8 text files to continue, as further prompts."""
    token_ids: Path | None = None
    """A .npy file of integers as further prompts, shape (tokens,) or (prompts, tokens)."""
    prompts: Path | None = None
    """A file of JSON lines, each {"prompt": a text or token ids} or {"messages": [...]}, and where wanted
    "id" and "max_new_tokens", whose replies go to --out."""
    out: Path | None = None
    """The file of JSON lines for the replies to --prompts. The same command goes on after any stop."""
    slots: int = 8
    """Of --prompts so many are decoded together; one that ends makes room for the next."""
    prompt_chars: int | None = None
    """Use only so many characters of each prompt file."""
    chat: Flag[bool] = False
    """Treat each prompt as a user's message, by the model's chat template; without any prompt, talk."""
    max_new_tokens: int = 256
    """Tokens to generate for each prompt, or in each reply."""
    capacity: int | None = None
    """Tokens that the cache holds; None: what is needed, or up to 4096 to talk."""
    verify: int | None = None
    """Draft up to so many tokens by the method, then check them by one pass of full attention, whose text
    this then is. None: the text is the method's."""
    save_state: Path | None = None
    """A new folder for the state at the end, from which --state goes on."""
    state: Path | None = None
    """Go on from a folder of --save-state, whose text is part of the output; with --prompt, one for each
    sequence, as its next turn. --dtype, --verify and the flags below are then by default as they were."""
    sampling: SamplingArguments = field(default_factory=SamplingFlags)

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self | None:
        """Returns the defaults with what a saved state was made with, if the arguments name one."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--state", nargs="?")
        folder = parser.parse_known_args(list(arguments))[0].state
        if folder is None:
            return super().defaults(arguments)
        from retro_jax.experiments.generate.saved import made_with

        return cls(model=tyro.MISSING, **made_with(Path(folder)))

    def run(self) -> None:
        """Generates, once or turn by turn."""
        from retro_jax.experiments.generate import chat
        from retro_jax.experiments.io.text import file_tokens, read_text
        from retro_jax.sizes import batch_rows, cache_capacity
        from retro_jax.verify import check_verify

        config = self.config.config()
        self.sampling.sampling()  # raises where its flags are wrong, before work begins
        if self.verify is not None:
            check_verify(config, self.verify)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        self._check_states()
        if self.prompts or self.out:
            self._many()
            return
        prompts = [*self.prompt, *(read_text(path, chars=self.prompt_chars) for path in self.prompt_file)]
        if self.token_ids:
            prompts += file_tokens(self.token_ids, None).tolist()
        if self.state:
            self._go_on(prompts)
            return
        if not prompts and not self.chat:
            raise ValueError(
                "there is nothing to continue; pass --prompt TEXT, --prompt-file FILE, --token-ids FILE.npy, "
                "--prompts FILE.jsonl or --chat"
            )
        needed = max(map(_least, prompts), default=1) + self.max_new_tokens
        model = self.load(
            [config],
            batch_rows(max(len(prompts), 1)),
            self.capacity or cache_capacity(needed),
            check=partial(self._check, prompts=prompts, needed=needed),
            without_tokenizer=self._without_tokenizer(prompts),
        )
        if not prompts:
            self._talk(model)
            return
        if self.chat:
            prompts = [chat.first_turn(model.tokenizer, prompt) for prompt in prompts]
        streamed = len(prompts) == 1 and model.tokenizer is not None and not self.json
        result, rates = self._generate(model, prompts, capacity=self.capacity, streamed=streamed)
        self._finish(model, result, rates, streamed)

    def _check(self, sizes: "ModelConfig", prompts: list, needed: int) -> None:
        """Raises ValueError if a model or the cache has too few positions, or no such tokens."""
        from retro_jax.experiments.io.models import check_positions
        from retro_jax.inputs import check_capacity, check_token_ids

        if self.capacity:
            check_positions(sizes, self.capacity, "--capacity", self.capacity)
        before = needed - self.max_new_tokens
        beside = f"{before} token{'s' * (before > 1)} before them"
        check_positions(sizes, needed, "--max-new-tokens", self.max_new_tokens, beside)
        check_capacity(sizes, needed, self.capacity)
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                check_token_ids(sizes, prompt, f"prompt {index}")

    def _without_tokenizer(self, prompts: list) -> str:
        """How a model without a tokenizer is refused; "": it is not."""
        from retro_jax.experiments.io.text import WITHOUT_TOKENIZER

        if self.chat:
            return ", so it cannot chat; use another model"
        return WITHOUT_TOKENIZER if any(isinstance(prompt, str) for prompt in prompts) else ""

    def _check_states(self) -> None:
        """Raises if a state cannot be kept, or gone on with, as the flags say."""
        from retro_jax.models.formats.checkpoint import check_new

        talks = self.chat and not (self.prompt or self.prompt_file or self.token_ids)
        if self.distributed and (talks or self.prompts):
            raise ValueError("--distributed can be used with --prompt, --prompt-file and --token-ids only")
        for name, folder in (("--save-state", self.save_state), ("--state", self.state)):
            if folder and (self.prompts or self.out):
                raise ValueError(f"{name} cannot be given with --prompts, whose command goes on by itself")
            if folder and talks:
                raise ValueError(f"{name} cannot be used to talk; pass --prompt with --chat, or leave it out")
        if self.state and (self.chat or self.preset):
            raise ValueError(
                "--state goes on with what it was made with; leave --chat and --preset out (a message of a "
                "conversation can be a --prompt as the chat template writes it)"
            )
        if self.save_state:
            check_new(self.save_state)

    def _go_on(self, prompts: list) -> None:
        """Goes on from a saved state, with the prompts as its sequences' next turns if there are any."""
        from retro_jax import load_state
        from retro_jax.experiments.generate.saved import so_far
        from retro_jax.inputs import check_capacity, prompt_ids
        from retro_jax.saved_states import read_state_about

        config, about = self.config.config(), read_state_about(self.state)
        count, used = len(about["generation"]["pending"]), max(about["lengths"])
        if prompts and len(prompts) != count:
            raise ValueError(
                f"{self.state} has {count} sequences, {len(prompts)} prompts were given; give one for each, "
                "or none to go on"
            )
        least = used + self.max_new_tokens
        given = least + max((1 + _least(prompt) for prompt in prompts), default=0)
        model = self.load(
            [config],
            about["rows"],
            max(about["capacity"], given),
            check=partial(self._check, prompts=prompts, needed=given),
            without_tokenizer=self._without_tokenizer(prompts),
        )
        ids = [prompt_ids(model, prompt, index, False) for index, prompt in enumerate(prompts)]
        needed = least + max((1 + len(row) for row in ids), default=0)
        room = self.capacity or about["capacity"]
        if needed > room:
            room = check_capacity(model.config, needed, self.capacity)
        saved = load_state(model, self.state, config, capacity=room)
        streamed = count == 1 and model.tokenizer is not None and not self.json
        before = so_far(model, saved) if streamed and not ids else ""
        result, rates = self._generate(model, ids or None, room, streamed, saved, before)
        self._finish(model, result, rates, streamed)

    def _finish(self, model: "Model", result: "Generation", rates: Rates, streamed: bool) -> None:
        """Shows all that was generated since the prompts, and keeps the state where that is asked for."""
        from retro_jax import save_state
        from retro_jax.experiments.generate.saved import turn_texts
        from retro_jax.experiments.io.files import print_json
        from retro_jax.experiments.io.provenance import provenance

        texts = turn_texts(model, result)
        if self.json:
            values = {
                "model": self.model,
                "config": asdict(result.config),
                "sampling": asdict(result.sampling),
                "verify": self.verify,
                "texts": texts,
                "tokens": result.turns,
                "finished": result.finished,
                "metrics": result.metrics.summary() if result.metrics else None,
                "seconds": rates.seconds,
                "compile_seconds": rates.show.compile_seconds,
                "steps_per_second": rates.per_second("decode"),
                "provenance": provenance(),
            }
            print_json(values)
        elif not streamed:
            for number, (text, tokens) in enumerate(zip(texts, result.turns, strict=True), 1):
                print(f"--- {number} ---\n{text if model.tokenizer else ' '.join(map(str, tokens))}")
        if self.save_state:
            save_state(model, result, self.save_state)
            print(f"[the state is in {self.save_state}; --state goes on from there]", file=sys.stderr)

    def _generate(
        self,
        model: "Model",
        prompts: list | None,
        capacity: int | None,
        streamed: bool,
        previous: "Generation | None" = None,
        before: str = "",
    ) -> "tuple[Generation, Rates]":
        from retro_jax import generate
        from retro_jax.experiments.generate.words import covered, summary
        from retro_jax.inputs import prompt_ids
        from retro_jax.sizes import batch_rows, cache_capacity

        config, sampling = self.config.config(), self.sampling.sampling()
        # The keys that a state was made with replace its seed, as long as it is sampled as it was.
        keys = previous.keys if previous is not None and previous.sampling == sampling else None
        if previous is None:
            prompts = [prompt_ids(model, prompt, index, True) for index, prompt in enumerate(prompts)]
            room = capacity or cache_capacity(max(map(len, prompts)) + self.max_new_tokens)
            self.check_memory(model.config, [config], batch_rows(len(prompts)), room, loaded=True)
        with Progress() as show:
            rates, unshown = Rates(show), iter([before])

            def stream(_: int, piece: str) -> None:
                if sys.stdout.isatty():
                    show.stop()
                print(next(unshown, ""), piece, sep="", end="", flush=True)

            result = generate(
                model,
                prompts,
                config,
                self.max_new_tokens,
                sampling=sampling,
                keys=keys,
                capacity=capacity,
                stream=stream if streamed else None,
                progress=rates,
                previous=previous,
                verify=self.verify,
            )
        if streamed:
            print(next(unshown, ""), flush=True)
        print(summary(result, rates), file=sys.stderr)
        if note := covered(result, model):
            print(note, file=sys.stderr)
        return result, rates

    def _many(self) -> None:
        """Replies to the prompts of a file that its replies' file does not have yet."""
        from retro_jax.experiments.generate.many import (
            Work,
            check_lines,
            check_out,
            read_prompts,
            reply_to,
            token_ids,
            without_tokenizer,
        )
        from retro_jax.experiments.generate.words import compiling
        from retro_jax.experiments.io.provenance import provenance
        from retro_jax.score_files import score_digest
        from retro_jax.sizes import cache_capacity, held_rows

        if not (self.prompts and self.out):
            raise ValueError("--prompts FILE.jsonl and --out FILE.jsonl belong together; give both")
        if self.prompt or self.prompt_file or self.token_ids or self.verify is not None:
            raise ValueError(
                "--prompts cannot be given with --prompt, --prompt-file, --token-ids or --verify; run one of "
                "them"
            )
        if self.slots < 1:
            raise ValueError(f"slots {self.slots} must be at least 1")
        if self.slots % self.data_devices:
            raise ValueError(
                f"slots {self.slots} do not divide over data_devices {self.data_devices}; use a multiple"
            )
        config, sampling = self.config.config(), self.sampling.sampling()
        lines = read_prompts(self.prompts, self.max_new_tokens)
        check_out(self.prompts, self.out)
        rows = held_rows(self.slots)
        model = self.load(
            [config],
            rows,
            self.capacity or cache_capacity(1),
            check=partial(check_lines, lines=lines, capacity=self.capacity),
            without_tokenizer=without_tokenizer(lines, self.chat),
        )
        ids = token_ids(model, lines, self.chat, self.capacity)
        needed = max(len(ids[line.id]) + line.max_new_tokens for line in lines)
        capacity = self.capacity or cache_capacity(needed, model.config.max_positions)
        self.check_memory(model.config, [config], rows, capacity, loaded=True)
        asked = {
            "model": self.model,
            "dtype": model.config.dtype,
            "revision": self.revision,
            "chat": self.chat,
        }
        asked |= {"config": asdict(config), "sampling": asdict(sampling)}
        if (learned := score_digest(model.params)) is not None:
            asked["learned"] = learned
        work = Work(model, asked, config, sampling, ids, self.slots, capacity)
        tokens = made = there = 0
        with Progress() as show:
            rates = Rates(show)
            for reply, done in reply_to(work, lines, self.out):
                rates("replies", done, len(lines))
                if reply is None:
                    there = done
                else:
                    tokens, made = tokens + len(reply.tokens), made + 1
        values = {"out": str(self.out), "replies": made, "were_there": there, "tokens": tokens}
        values |= {
            "seconds": rates.seconds,
            "compile_seconds": show.compile_seconds,
            "provenance": provenance(),
        }
        text = f"{there + made} replies: {self.out}"
        if made:
            text += f" ({made} of them new: {tokens} tokens in {rates.seconds:.1f} s{compiling(rates)})"
        self.show(values, text)

    def _talk(self, model: "Model") -> None:
        """Reads messages from stdin until it ends, on one cache while the template keeps earlier turns."""
        from retro_jax.experiments.generate import chat

        if self.json:
            raise ValueError("--json cannot be used to talk; pass --prompt with --chat")
        capacity = self.capacity or min(4096, model.config.max_positions)
        messages, held, result = [], [], None
        print("Type a message; an empty line or Ctrl-D ends.", file=sys.stderr)
        while message := _read_message():
            messages.append({"role": "user", "content": message})
            whole = chat.prompt(model.tokenizer, messages)
            ids = chat.continuation(whole, held)
            if ids is None:
                print(
                    "The chat template makes something else of earlier turns than the cache holds; "
                    "it is made anew.",
                    file=sys.stderr,
                )
                ids, result = whole, None
            result, _ = self._generate(model, [ids], capacity, streamed=True, previous=result)
            held = [*whole, *result.tokens[0]]
            messages.append({"role": "assistant", "content": result.texts[0]})


def _least(prompt: "str | Sequence[int]") -> int:
    """Tokens that a prompt has, at least."""
    return 1 if isinstance(prompt, str) else len(prompt)


def _read_message() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
