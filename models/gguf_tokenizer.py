"""Rebuilds a tokenizer from the metadata of a GGUF file.

A new pre-tokenizer is one entry in `PRE_TOKENIZERS`, named as llama.cpp names it in `tokenizer.ggml.pre`.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from models.tokenizer import Tokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Values of tokenizer.ggml.token_type that are matched in the text before the pre-tokenizer."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": lambda: _split(_LLAMA3_SPLIT),
    "qwen2": lambda: _split(_QWEN2_SPLIT),
    "deepseek-r1-qwen": lambda: _split(_QWEN2_SPLIT),
}
_NFC = ("qwen2", "deepseek-r1-qwen")


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
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
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
    bos, eos = (_token(metadata, f"tokenizer.ggml.{name}_token_id", tokens) for name in ("bos", "eos"))
    ends = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return Tokenizer(
        backend,
        bos_token=bos,
        eos_token=eos,
        stop_ids=[metadata[key] for key in ends if key in metadata],
        # llama.cpp's defaults for files that do not say.
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _token(metadata: Mapping[str, Any], key: str, tokens: list[str]) -> str | None:
    return tokens[metadata[key]] if key in metadata else None


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
            ignore_merges=pre == "llama-bpe",
        )
    )
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    if pre in _NFC:
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
