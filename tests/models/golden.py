"""Reads what Hugging Face transformers computed, from the files in golden/."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "golden"
FAMILIES = sorted(path for path in FOLDER.iterdir() if path.is_dir())
GGUF_FILES = sorted(FOLDER.glob("*.gguf"))
EXCERPT = FOLDER / "middlemarch.txt"


@dataclass(frozen=True)
class TinyGolden:
    """Float32 logits (B, T, V) of a tiny model for its tokens (B, T)."""

    tokens: np.ndarray
    logits: np.ndarray


def tiny(path: Path) -> TinyGolden:
    """Golden of a folder or GGUF file in golden/; a folder's is also that of a file of its name."""
    folder = path if path.is_dir() else path.with_suffix("")
    with np.load(folder / "golden.npz" if folder.is_dir() else path.with_suffix(".npz")) as arrays:
        return TinyGolden(arrays["tokens"], arrays["logits"])


@dataclass(frozen=True)
class SmolLM2Golden:
    """SmolLM2 on the excerpt: prefill of a prompt, then teacher-forced decode steps through a KV cache.

    Attributes:
        tokens: int32 (T,), ids of the excerpt.
        prompt_tokens: the first so many were prefilled together, each later one is a decode step.
        argmax: int32 (T,), most likely token after each.
        logsumexp: float64 (T,), of the logits after each.
        positions: int64 (R,), every fourth position of the prompt and all decode steps.
        vocab_ids: int64 (256,), some of the vocabulary.
        logits: float32 (R, 256), after `positions`, of `vocab_ids`.
    """

    tokens: np.ndarray
    prompt_tokens: int
    argmax: np.ndarray
    logsumexp: np.ndarray
    positions: np.ndarray
    vocab_ids: np.ndarray
    logits: np.ndarray

    def assert_matches(self, logits: np.ndarray, start: int, atol: float) -> None:
        """Compares float32 logits (t, V), after the tokens `start`, `start` + 1, ..., with these."""
        stop = start + len(logits)
        rows = (self.positions >= start) & (self.positions < stop)
        ours = logits[self.positions[rows] - start][:, self.vocab_ids]
        assert rows.any()
        np.testing.assert_allclose(ours, self.logits[rows], rtol=0, atol=atol)
        peak = logits.max(axis=-1).astype(np.float64)
        logsumexp = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=-1))
        np.testing.assert_allclose(logsumexp, self.logsumexp[start:stop], rtol=0, atol=atol)
        np.testing.assert_array_equal(logits.argmax(axis=-1), self.argmax[start:stop])


def smollm2() -> SmolLM2Golden:
    with np.load(FOLDER / "smollm2.npz") as arrays:
        return SmolLM2Golden(**{**arrays, "prompt_tokens": int(arrays["prompt_tokens"])})


def token_samples(path: Path) -> dict[str, Any]:
    """What an independent tokenizer made: {"texts", "ids", "messages", maybe "chat" and "decoded"}."""
    return json.loads(path.read_text(encoding="utf-8"))
