"""Perplexity along books, as with PG-19 (Rae et al., arXiv 1911.05507): a prompt, then decoding along it.

The books are text files: PG-19's own (`test/*.txt`) or any others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.io.text import read_text
from retro_jax.experiments.tasks.base import Nominal, Passage, Task, check_at_least, seeded
from retro_jax.experiments.tasks.sources import find

CHARS_PER_TOKEN = 8
"""Characters kept for each token: more than any tokenizer of English text takes on average."""


@dataclass(frozen=True)
class PG19(Task):
    """Negative log-likelihood of books' tokens, decoded along after a short prompt, against position."""

    metric: ClassVar[str] = "NLL"
    local: ClassVar[bool] = True

    data: Path | None = None
    """A folder of UTF-8 .txt files, or one such file; None: the novel that comes with this package."""
    prompt_tokens: int = 1024
    """Tokens at the beginning that are read at once with full attention."""
    tokens: int = 4096
    """Length of each excerpt, the prompt included."""
    excerpts: int = 1
    """Excerpts of each book, at seeded places that do not overlap."""
    skip_chars: int = 0
    """Characters left out at the start of each book, such as a title page."""

    def check(self) -> None:
        """Raises ValueError if a field is out of its range."""
        check_at_least(self, 1, "prompt_tokens", "excerpts")
        check_at_least(self, 0, "skip_chars")
        if self.tokens <= self.prompt_tokens:
            raise ValueError(f"task.tokens {self.tokens} must exceed task.prompt_tokens {self.prompt_tokens}")

    def nominal(self) -> Nominal:
        """What the task takes; PG-19's test split has 100 books."""
        return Nominal(
            100 * self.excerpts, 4 * self.prompt_tokens, self.tokens - self.prompt_tokens, forced=True
        )

    def examples(self, seed: int, limit: int | None) -> list[Passage]:
        """Excerpts: a book's only one begins where the book does, several at seeded places."""
        found = []
        texts = Path(__file__).resolve().parent.parent / "texts"
        for path in find(self.data or texts, ["*.txt", "test/*.txt"]):
            book = read_text(path, self.skip_chars)
            share = len(book) // self.excerpts
            length = min(CHARS_PER_TOKEN * self.tokens, share)
            for index in range(self.excerpts):
                room = share - length if self.excerpts > 1 else 0
                start = index * share + seeded("pg19", path.stem, index, seed).randrange(room + 1)
                text = book[start : start + length]
                found.append(
                    Passage(
                        id=f"{path.stem}-{index}",
                        prompt=text[text.find(" ") + 1 :] if start else text,  # not from within a word
                        prompt_tokens=self.prompt_tokens,
                        max_new_tokens=self.tokens - self.prompt_tokens,
                    )
                )
        return found[:limit]

    def grade_reply(self, example: Passage, reply: str) -> list[float]:
        """Never called: a passage is not generated."""
        raise TypeError(f"{example.id} is decoded along, not generated")
