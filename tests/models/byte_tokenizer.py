"""A tokenizer with one token per byte after three special ones, and folders that hold it."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors

SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>"]


def byte_backend(single: str | None = "<|begin|> $A") -> tokenizers.Tokenizer:
    """Ids 0 to 258; `single` is the template of its post-processor."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if single is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, i) for i, token in enumerate(SPECIAL)]
        )
    return backend


def write_tokenizer(folder: Path, backend: tokenizers.Tokenizer | None = None, **files) -> Path:
    """Writes tokenizer.json, and the JSON `files` by their names without the suffix."""
    (backend or byte_backend()).save(str(folder / "tokenizer.json"))
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return folder
