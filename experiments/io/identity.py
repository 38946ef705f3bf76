"""What a folder of results over texts is known by, as far as it can be told before a model is read."""

from collections.abc import Collection
from dataclasses import asdict
from typing import TYPE_CHECKING

from retro_jax.experiments.io.flags import TextCommand
from retro_jax.experiments.io.text import check_sources, digest, file_tokens, ids_names, text_names

if TYPE_CHECKING:
    from retro_jax import DecodeConfig


def known_identity(asked: TextCommand, common: "DecodeConfig", varied: Collection[str]) -> dict:
    """Returns those values of an identity that flags and files tell, as JSON values.

    Args:
      asked: model and texts.
      common: how all results decode.
      varied: fields of it in which they differ.

    Raises:
      FileNotFoundError: a text is not there.
      ValueError: the texts are not as the flags say.
    """
    check_sources(asked.text, asked.token_ids, asked.tokens)
    known = {"model": asked.model, "prompt_tokens": asked.prompt_tokens}
    if asked.dtype is not None:
        known["dtype"] = asked.dtype
    if asked.token_ids is None:
        known["texts"] = text_names(asked.text)
        if asked.tokens is not None:
            known["tokens"] = asked.tokens
    else:
        ids = file_tokens(asked.token_ids, asked.tokens)
        known |= {"texts": ids_names(asked.token_ids, len(ids)), "tokens": ids.shape[1]}
        known["token_ids"] = digest(ids)
    return known | {"config": {key: value for key, value in asdict(common).items() if key not in varied}}
