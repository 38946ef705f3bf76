"""The texts of sequences as they grow: pieces to stream, and the strings at which they end."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from retro_jax.models import Tokenizer

_UNFINISHED = "\ufffd"
"""What the bytes of a character that is not whole yet decode to."""


class Texts:
    """Collects the tokens of a turn per sequence, turns them into text, and says which sequences have ended.

    Args:
      tokenizer: None where the model has none; texts are empty then.
      turns: tokens that each sequence generated since its last prompt; more will follow.
      stop_tokens: a sequence that has generated one ends, and its text before it.
      stop: a sequence in whose text one of these strings comes up ends, and its text before the string.
      stream: called with the index of a sequence and the text it has grown by.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        turns: Sequence[Sequence[int]],
        stop_tokens: Sequence[int],
        stop: Sequence[str],
        stream: Callable[[int, str], None] | None,
    ):
        self.tokenizer, self.stop_tokens, self.stop, self.stream = tokenizer, set(stop_tokens), stop, stream
        self.turns = [list(turn) for turn in turns]
        self.before = [len(turn) for turn in turns]
        # A character that earlier tokens began belongs to this text; a string that ended in them ends it, if
        # the last of them completed it, and otherwise was passed over by who asked for this text.
        self.begin = [len(self._decode(turn).rstrip(_UNFINISHED)) for turn in turns]
        self.searched = [len(self._decode(turn[:-1])) for turn in turns]
        self.streamed = list(self.begin)
        self.ended = [False] * len(self.turns)
        for index in range(len(self.turns)):
            self._end(index)

    def append(self, tokens: Int[np.ndarray, "B steps"], emitted: Bool[np.ndarray, "B steps"]) -> None:
        """Add the emitted tokens; with `stop` one at a time, so that a sequence ends where it should."""
        for index, (chosen, mask) in enumerate(zip(tokens, emitted, strict=True)):
            if not mask.any():
                continue
            self.turns[index].extend(int(token) for token in chosen[mask])
            self._end(index)
            if self.stream:
                self._stream(index, self._held_back(index))

    def flush(self) -> None:
        """Stream what was held back."""
        for index in range(len(self.turns)):
            self._stream(index, 0)

    def tokens(self, index: int) -> list[int]:
        """What was appended, the stop token included."""
        return self.turns[index][self.before[index] :]

    def text(self, index: int) -> str:
        """The text of what was appended."""
        text, end = self._until(index)
        return text[self.begin[index] : end]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens) if self.tokenizer and len(tokens) else ""

    def _until(self, index: int) -> tuple[str, int]:
        """The text of the whole turn without its stop token, and where it ends before a stop string."""
        turn = self.turns[index]
        text = self._decode(turn[:-1] if turn and turn[-1] in self.stop_tokens else turn)
        starts = (text.find(stop, max(self.searched[index] - len(stop) + 1, 0)) for stop in self.stop)
        return text, min((start for start in starts if start >= 0), default=len(text))

    def _end(self, index: int) -> None:
        turn = self.turns[index]
        self.ended[index] = bool(turn) and turn[-1] in self.stop_tokens
        if self.stop and not self.ended[index]:
            text, end = self._until(index)
            self.ended[index] = end < len(text)

    def _held_back(self, index: int) -> int:
        """Characters at the end that may not stay: an unfinished one, or the beginning of a stop string."""
        text, _ = self._until(index)
        if self.ended[index]:
            return 0
        whole = text.rstrip(_UNFINISHED)
        begun = (n for stop in self.stop for n in range(1, len(stop)) if whole.endswith(stop[:n]))
        return len(text) - len(whole) + max(begun, default=0)

    def _stream(self, index: int, held_back: int) -> None:
        text, end = self._until(index)
        end -= held_back
        if self.stream and end > self.streamed[index]:
            self.stream(index, text[self.streamed[index] : end])
            self.streamed[index] = end
