"""Conversations to prompts, by the model's chat template.

A template may rewrite earlier turns: drop what a reply thought, or trim it. Decoding goes on from the cache
only where the cache holds the beginning of what the template makes of the whole conversation.
"""

from collections.abc import Mapping, Sequence

from retro_jax.models import Tokenizer


def prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Returns the token ids of a conversation, up to where the model's reply begins.

    Args:
      tokenizer: has the chat template.
      messages: turns as {"role": ..., "content": ...}, the last by the user.
    """
    return tokenizer.encode(tokenizer.chat(messages, add_generation_prompt=True), add_bos=False)


def first_turn(tokenizer: Tokenizer, message: str) -> list[int]:
    """Returns the token ids of a conversation that begins with this message of the user."""
    return prompt(tokenizer, [{"role": "user", "content": message}])


def continuation(whole: Sequence[int], held: Sequence[int]) -> list[int] | None:
    """Returns the token ids that come after those that are held; None if the whole does not begin with those.

    Args:
      whole: token ids of the whole conversation.
      held: token ids in the cache, and the reply's last token, which decoding adds by itself.
    """
    if len(whole) <= len(held) or list(whole[: len(held)]) != list(held):
        return None
    return list(whole[len(held) :])
