"""Messages to prompts: the first by the whole chat template, later ones by what it adds after a reply."""

from models import Tokenizer

_REPLY = "THE-REPLY-STANDS-HERE"


def first_turn(tokenizer: Tokenizer, message: str) -> list[int]:
    """Returns the token ids of a conversation that begins with this message of the user."""
    text = tokenizer.chat([{"role": "user", "content": message}], add_generation_prompt=True)
    return tokenizer.encode(text, add_bos=False)


def next_turn(tokenizer: Tokenizer, message: str, pending: int) -> list[int]:
    """Returns the token ids between two replies: the first's end, the user's message, the second's head.

    Args:
      tokenizer: its template is rendered with a placeholder for the reply, which is in the cache already.
      message: the user's next message.
      pending: the reply's last token, which decoding adds by itself; the reply's end is not repeated if it
        is that token.
    """
    messages = [
        {"role": "user", "content": "."},
        {"role": "assistant", "content": _REPLY},
        {"role": "user", "content": message},
    ]
    after = tokenizer.chat(messages, add_generation_prompt=True).split(_REPLY, 1)[1]
    ids = tokenizer.encode(after, add_bos=False)
    return ids[1:] if ids[0] == pending else ids
