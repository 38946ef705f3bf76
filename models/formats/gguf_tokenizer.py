"""Rebuilds a tokenizer from the metadata of a GGUF file.

A new pre-tokenizer is one entry in `PRE_TOKENIZERS`, named as llama.cpp names it in `tokenizer.ggml.pre`.
"""

import logging
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from retro_jax.models.tokenizer import END_TOKENS, Tokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Values of tokenizer.ggml.token_type that are matched in the text before the pre-tokenizer."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_LOWER_END = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_START = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_CASE_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_SPLIT = rf"{_LOWER_END}|{_UPPER_START}|\p{{N}}{_CASE_REST}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_SPLIT = rf"{_LOWER_END}{_SUFFIX}|{_UPPER_START}{_SUFFIX}|\p{{N}}{{1,3}}{_CASE_REST}"
_UNNAMED_SPLITS = (
    r"[\p{P}$+<=>^~|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)

_logger = logging.getLogger(__name__)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
_DBRX = ("dbrx", "smaug-bpe")  # what llama.cpp calls that of Phi-4 and OLMo 2, and of SmolLM3
_QWEN2 = ("qwen2", "deepseek-r1-qwen", "megrez")
_GPT2 = ("gpt-2", "phi-2", "exaone4", "a.x-4.0", "mellum", "olmo", "jais", "mpt")
_SMOLLM = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
PRE_TOKENIZERS = {
    "default": lambda: _split(*_UNNAMED_SPLITS),
    **dict.fromkeys(_GPT2, _gpt2),
    **dict.fromkeys(_SMOLLM, _smollm),
    **dict.fromkeys((*_LLAMA3, *_DBRX), lambda: _split(_LLAMA3_SPLIT)),
    **dict.fromkeys(_QWEN2, lambda: _split(_QWEN2_SPLIT)),
    "tekken": lambda: _split(_TEKKEN_SPLIT),
    "gpt-4o": lambda: _split(_GPT4O_SPLIT),
}
"""By the name that llama.cpp gives them; "default" is what it does for files that name none."""

_WHOLE_WORDS = (*_LLAMA3, "tekken")
"""Those with which a word that is a token is one, whatever the merges, and a text begins with a token."""


def tokenizer_from_metadata(metadata: Mapping[str, Any], source: str) -> Tokenizer | None:
    """Builds the tokenizer that the metadata describes; None if it describes none.

    Args:
        metadata: keys and values of the GGUF file.
        source: the file, for messages.

    Raises:
        ValueError: if the tokenizer's model or pre-tokenizer is unknown, or its tables are broken.
    """
    if "tokenizer.ggml.model" not in metadata:
        return None
    try:
        return _tokenizer(metadata, source)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{source} has an incomplete tokenizer: {error}") from error


def _tokenizer(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    kind, tokens = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.tokens"]
    types = list(metadata.get("tokenizer.ggml.token_type", [1] * len(tokens)))
    _check_lengths(metadata, len(tokens), source)
    # As in llama.cpp, an end of turn ends turns even if a converter marked it as a word.
    types = [CONTROL if token in END_TOKENS else kind for token, kind in zip(tokens, types, strict=True)]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        if "tokenizer.ggml.pre" not in metadata:
            _logger.warning(
                "%s names no pre-tokenizer, so llama.cpp's default is taken; convert the model again", source
            )
        backend = _byte_level_bpe(tokens, metadata["tokenizer.ggml.merges"], pre, source)
    elif kind == "llama":
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        backend = _sentencepiece_bpe(tokens, metadata["tokenizer.ggml.scores"], types, prefix)
    else:
        raise ValueError(f"{source} has a tokenizer of type {kind!r}; gpt2 and llama are supported")
    added = [
        AddedToken(token, normalized=False, special=token_type != USER_DEFINED)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    # SentencePiece has its begin and end at 1 and 2 if the file does not say.
    usual = {"bos": 1, "eos": 2} if kind == "llama" else {}
    bos, eos = (_token(metadata, name, tokens, usual.get(name)) for name in ("bos", "eos"))
    # llama.cpp's defaults for files that do not say.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _WHOLE_WORDS)
    if bos is None and metadata.get("tokenizer.ggml.add_bos_token"):
        raise ValueError(f"{source} has add_bos_token, but no tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_eos_token"):
        _logger.warning(
            "%s ends each text with %r; it is left out, so that texts can be continued", source, eos
        )
    named = {f"{name}_token": _token(metadata, name, tokens) for name in ("unknown", "padding")}
    ends = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return Tokenizer(
        backend,
        bos_token=bos,
        eos_token=eos,
        stop_ids=[metadata[key] for key in ends if key in metadata],
        add_bos=add_bos,
        chat_template=metadata.get("tokenizer.chat_template"),
        template_tokens={
            # llama.cpp defines these two always.
            "bos_token": bos or "",
            "eos_token": eos or "",
            "unk_token": named["unknown_token"],
            "pad_token": named["padding_token"],
        },
    )


def _check_lengths(metadata: Mapping[str, Any], count: int, source: str) -> None:
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if len(metadata.get(key, [None] * count)) != count:
            raise ValueError(f"{source} has {len(metadata[key])} entries of {key} for {count} tokens")


def _token(metadata: Mapping[str, Any], name: str, tokens: list[str], usual: int | None = None) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", usual)
    return None if token_id is None else tokens[token_id]


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: str, source: str) -> Backend:
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{source} needs the pre-tokenizer {pre!r}, supported are "
            f"{', '.join(PRE_TOKENIZERS)}; use the model's Hugging Face folder, which has tokenizer.json"
        )
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre in _WHOLE_WORDS,
        )
    )
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    if pre in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    tokens: list[str], scores: list[float], types: list[int], space_prefix: bool
) -> Backend:
    """SentencePiece BPE with byte fallback: the merge of the best-scored piece comes first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (score, token[:cut], token[cut:])
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind == 1
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges.sort(key=lambda merge: (merge[0], len(merge[1])), reverse=True)
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [normalizers.Replace(" ", "▁")]
    text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
        text.append(decoders.Strip(" ", 1, 0))
    backend.normalizer, backend.decoder = normalizers.Sequence(spaces), decoders.Sequence(text)
    return backend
