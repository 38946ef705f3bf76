"""What a task asks of generated text, in this library's words."""

from collections.abc import Mapping
from dataclasses import dataclass

from lm_eval.models.utils import normalize_gen_kwargs

from retro_jax import Sampling
from retro_jax.models import Tokenizer

WITHOUT_EFFECT = {"num_beams": 1, "repetition_penalty": 1.0}
"""Options of other programs, and the values at which they ask for nothing."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for one reply.

    Attributes:
      max_new_tokens: it has at most so many tokens.
      sampling: how they are chosen.
      stop: strings before which it ends.
      stop_tokens: tokens before which it ends.
    """

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]


def read_options(
    tokenizer: Tokenizer, options: Mapping[str, object], max_new_tokens: int, seed: int
) -> Wanted:
    """Reads a task's generation options.

    Special tokens never come up in a text, so that those among `until` are looked for among the tokens.

    Args:
      tokenizer: of the model.
      options: "until", "max_gen_toks" (or another of lm-eval's names for it), "do_sample", "temperature",
        "top_k", "top_p".
      max_new_tokens: where they do not say.
      seed: of random draws.

    Raises:
      ValueError: an option is not known, or has a value that cannot be.
    """
    left = dict(normalize_gen_kwargs(dict(options), max_new_tokens))
    until, new = left.pop("until"), left.pop("max_gen_toks")
    sampled, temperature = left.pop("do_sample"), float(left.pop("temperature", 0.0))
    drawing = {name: left.pop(name) for name in ("top_k", "top_p") if left.get(name) is not None}
    for name, value in left.items():
        if value is not None and (name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]):
            raise ValueError(
                f"generation option {name}={value!r} is not supported; use until, max_gen_toks, do_sample, "
                "temperature, top_k and top_p"
            )
    if sampled and temperature == 0:
        raise ValueError("do_sample is true at temperature 0, which is greedy; give a temperature above 0")
    if new < 1:
        raise ValueError(f"max_gen_toks {new} must be at least 1")
    special = {
        token.content: number
        for number, token in tokenizer.backend.get_added_tokens_decoder().items()
        if token.special
    }
    ends = {special[string] for string in until if string in special}
    return Wanted(
        max_new_tokens=new,
        sampling=Sampling(temperature=temperature, seed=seed, **drawing),
        stop=tuple(string for string in until if string not in special),
        stop_tokens=tuple(sorted({*tokenizer.stop_ids, *ends})),
    )
