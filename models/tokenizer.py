"""Text to token ids and back, and chat templates."""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "</s>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek writes it so)
)
"""Special tokens that end a text or a turn in every family that has them."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with what generation needs to know besides.

    Attributes:
        vocab_size: number of known ids; a model's embedding may have more rows.
        bos_id: the id that begins a text, None if the model has none.
        stop_ids: all ids that end a text or a turn.
        add_bos: whether the model was trained with `bos_id` before each text.
        chat_template: the Jinja source, None if the model has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_token: str | None = None,
        eos_token: str | None = None,
        stop_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
    ):
        self.backend = backend
        self.bos_token, self.eos_token = bos_token, eos_token
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        special = {
            token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special
        }
        ends = [special[token] for token in (*END_TOKENS, eos_token) if token in special]
        self.stop_ids = tuple(sorted({*stop_ids, *ends}))
        self.add_bos = add_bos and self.bos_id is not None
        self.chat_template = chat_template

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised.

        Args:
            text: any text, also the result of `chat`.
            add_bos: begin with `bos_id`; None follows the model's habit. Never doubled.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        add = self.add_bos if add_bos is None else add_bos and self.bos_id is not None
        return [self.bos_id, *ids] if add and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation by the model's chat template; `encode` the result.

        Args:
            messages: turns as {"role": "system" | "user" | "assistant", "content": text}.
            add_generation_prompt: end with what begins the assistant's next turn.

        Raises:
            ValueError: if the model has no chat template, or the template is broken or refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; pass plain text as the prompt")
        try:
            return _ENVIRONMENT.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML, which templates written for transformers do not expect.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face chat templates are written for; sandboxed, as models bring their own code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


_ENVIRONMENT = _environment()
