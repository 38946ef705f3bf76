"""Tokenizers in Hugging Face's layout: tokenizer.json, and what the files beside it say.

Several files may say the same thing. The order is that of transformers 5:

- How text becomes ids, and whether a text begins with a token, is tokenizer.json's; `add_bos_token` and
  `add_eos_token` of tokenizer_config.json do not change it.
- Special tokens have their names from special_tokens_map.json, then tokenizer_config.json, unless the latter
  has `added_tokens_decoder`: then the former is a leftover.
- Tokens that tokenizer.json lacks come from `added_tokens_decoder`, or else added_tokens.json.
- A chat template is that of chat_template.jinja, or else of tokenizer_config.json.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from retro_jax.models.tokenizer import Tokenizer

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
OTHER_FORMATS = ("tokenizer.model", "vocab.json", "merges.txt", "tekken.json", "tiktoken.model")
"""Files of tokenizers in formats that are not read here."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that have a name, by which chat templates see them."""

_logger = logging.getLogger(__name__)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder in Hugging Face's layout has a tokenizer, in whatever format."""
    return any((folder / name).exists() for name in ("tokenizer.json", *OTHER_FORMATS))


def load_tokenizer(folder: Path, stop_ids: Iterable[int] = ()) -> Tokenizer | None:
    """Tokenizer of a folder in Hugging Face's layout, None if it has no file of a tokenizer.

    Args:
        folder: holds tokenizer.json and maybe others of `FILES`.
        stop_ids: ends of text that are known from elsewhere.

    Raises:
        ValueError: if one of the files is broken, they contradict each other, or the tokenizer is in another
            format only.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        others = [name for name in OTHER_FORMATS if (folder / name).exists()]
        if not others:
            return None
        raise ValueError(
            f"{folder} has its tokenizer as {', '.join(others)} only; tokenizer.json is needed. Make it with "
            "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{path} is broken ({error}); fetch it again") from error
    settings = read_json(folder / "tokenizer_config.json") or {}
    generation = read_json(folder / "generation_config.json") or {}
    named = _named_tokens(folder, settings, backend)
    _add_tokens(folder, settings, backend, set(named.values()))
    # Both are left on in the file by training programs; they would change what is found out below.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    begin, end = _post_processor(path, backend)
    if settings.get("add_bos_token") not in (None, begin is not None):
        _logger.warning(
            "%s %s each text with a token, against add_bos_token in tokenizer_config.json; tokenizer.json "
            "is followed",
            path,
            "does not begin" if begin is None else "begins",
        )
    if end is not None:
        _logger.warning(
            "%s ends each text with %r; it is left out, so that texts can be continued", path, end
        )
    for name in ("bos_token", "eos_token"):
        if name in named and backend.token_to_id(named[name]) is None:
            _logger.warning("%s has no token %r, which is named %s; it is ignored", path, named[name], name)
    return Tokenizer(
        backend,
        bos_token=begin or named.get("bos_token"),
        eos_token=named.get("eos_token"),
        stop_ids=[*stop_ids, *as_list(generation.get("eos_token_id"))],
        add_bos=begin is not None,
        chat_template=_chat_template(folder, settings),
        template_tokens=named,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """Contents of a JSON file that holds an object, None if there is no such file.

    Raises:
        ValueError: if the file is broken.
    """
    if not path.exists():
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); fetch it again") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is broken (it holds no JSON object); fetch it again")
    return contents


def as_list(ids: int | list[int] | None) -> list[int]:
    """Token ids, which are written as a number if there is one."""
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def _text(token: str | Mapping[str, Any] | None) -> str | None:
    """Tokens are written as text or as a record with the text as its content."""
    return token["content"] if isinstance(token, Mapping) else token


def _named_tokens(folder: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, str]:
    named = {name: _text(settings.get(name)) for name in NAMED_TOKENS}
    if "added_tokens_decoder" not in settings:
        legacy = read_json(folder / "special_tokens_map.json") or {}
        named |= {name: _text(legacy[name]) for name in NAMED_TOKENS if name in legacy}
    if named["pad_token"] is None and backend.padding is not None:
        named["pad_token"] = backend.padding["pad_token"]
    return {name: token for name, token in named.items() if token is not None}


def _add_tokens(
    folder: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer, special: set[str]
) -> None:
    """Adds the tokens that other files list and tokenizer.json lacks; their ids must be the next ones."""
    if "added_tokens_decoder" in settings:
        source = folder / "tokenizer_config.json"
        listed = {int(i): token for i, token in settings["added_tokens_decoder"].items()}
    else:
        source = folder / "added_tokens.json"
        listed = {
            i: {"content": text, "special": text in special, "normalized": text not in special}
            for text, i in (read_json(source) or {}).items()
        }
    for i, token in sorted(listed.items()):
        found = backend.token_to_id(token["content"])
        if found is None:
            fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
            flags = {field: token[field] for field in fields if field in token}
            backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
            found = backend.token_to_id(token["content"])
        if found != i:
            raise ValueError(
                f"{source} gives {token['content']!r} the id {i}, tokenizer.json {found}; "
                "fetch both from the same place"
            )


def _post_processor(path: Path, backend: tokenizers.Tokenizer) -> tuple[str | None, str | None]:
    """The tokens that tokenizer.json puts before and after each text."""
    plain, whole = (backend.encode("a", add_special_tokens=special) for special in (False, True))
    count = len(whole.ids) - len(plain.ids)
    for before in range(count + 1):
        if whole.ids[before : before + len(plain.ids)] == plain.ids:
            begin, end = whole.tokens[:before], whole.tokens[before + len(plain.ids) :]
            if len(begin) <= 1 and len(end) <= 1:
                return (begin or [None])[0], (end or [None])[0]
    raise ValueError(f"{path} makes {whole.tokens} of 'a'; at most one token before and after is supported")


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        if "default" not in template:
            _logger.warning(
                "%s has the chat templates %s and no default; none is used", folder, ", ".join(template)
            )
        return template.get("default")
    return template
