"""Text to token ids and back, and chat templates."""

from collections.abc import Iterable, Mapping, Sequence

import tokenizers

from retro_jax.models import chat_template
from retro_jax.models.chat_template import Message

END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek writes it so)
)
"""Special tokens that end a text or a turn in every family that has them, but for `MESSAGE_END`."""

MESSAGE_END, TURN_END = "<|end|>", "<|return|>"
"""The first ends but a message of a turn where there is the second, which ends the turn."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with what generation needs to know besides.

    Attributes:
        vocab_size: number of known ids; a model's embedding may have more rows.
        bos_id: the id that begins a text, None if the model has none.
        stop_ids: all ids that end a text or a turn.
        add_bos: whether the model was trained with `bos_id` before each text.
        chat_template: the Jinja source, None if the model has none.
        template_tokens: what the template sees of special tokens: text by name, such as "bos_token".
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_token: str | None = None,
        eos_token: str | None = None,
        stop_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
    ):
        """Describes a tokenizer.

        Args:
            backend: does the work; truncation and padding, which files can leave on, are switched off on it.
            bos_token: begins a text.
            eos_token: ends a text.
            stop_ids: further ids that end a text or a turn.
            add_bos: begin each text with `bos_token`.
            chat_template: the Jinja source.
            template_tokens: None: those of `bos_token` and `eos_token` that there are.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token, self.eos_token = bos_token, eos_token
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        special = {
            token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special
        }
        ends = {special[token] for token in END_TOKENS if token in special}
        if TURN_END in special:
            ends.discard(special.get(MESSAGE_END))
        if eos_token is not None and (eos_id := backend.token_to_id(eos_token)) is not None:
            ends.add(eos_id)
        self.stop_ids = tuple(sorted({*stop_ids, *ends}))
        self.add_bos = add_bos and self.bos_id is not None
        self.chat_template = chat_template
        named = (
            {"bos_token": bos_token, "eos_token": eos_token} if template_tokens is None else template_tokens
        )
        self.template_tokens = {name: token for name, token in named.items() if token is not None}

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

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Renders a conversation by the model's chat template; `encode` the result with `add_bos=False`.

        Args:
            messages: turns as {"role": "system" | "user" | "assistant", "content": text}.
            add_generation_prompt: end with what begins the assistant's next turn.

        Raises:
            ValueError: if the model has no chat template, or the template is broken or refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; pass plain text as the prompt")
        return chat_template.render(self.chat_template, messages, add_generation_prompt, self.template_tokens)
