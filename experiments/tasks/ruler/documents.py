"""Questions about documents among others of their data set, SQuAD or HotpotQA, in its published form."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_jax.experiments.io.folders import digest
from retro_jax.experiments.tasks.base import seeded
from retro_jax.experiments.tasks.ruler.material import Made
from retro_jax.experiments.tasks.sources import find, records


@dataclass(frozen=True)
class Asking:
    """A question, what answers it, and documents.

    Attributes:
      question: of the data set.
      answers: any of which is right.
      needed: the documents that go with it, by number.
      near: further ones of the same article, the first to be put beside them.
    """

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """A data set: its file, where that is, and how it is read.

    Attributes:
      file: its published name.
      source: where it is to be had.
      read: (records of the file, what gives a document its number) -> questions.
      fields: that each record has.
    """

    file: str
    source: str
    read: Callable[[Sequence[dict], Callable[[str], int]], Iterator[Asking]]
    fields: tuple[str, ...]


def _squad(found: Sequence[dict], numbered: Callable[[str], int]) -> Iterator[Asking]:
    """Questions that have an answer, each with its paragraph and those of the same article."""
    for article in found[0]["data"]:
        paragraphs = [(numbered(paragraph["context"]), paragraph) for paragraph in article["paragraphs"]]
        for own, paragraph in paragraphs:
            near = tuple(dict.fromkeys(number for number, _ in paragraphs if number != own))
            for asked in paragraph["qas"]:
                if not asked.get("is_impossible"):
                    answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                    yield Asking(asked["question"], answers, (own,), near)


def _hotpotqa(found: Sequence[dict], numbered: Callable[[str], int]) -> Iterator[Asking]:
    """Questions, each with its ten paragraphs."""
    for record in found:
        needed = [numbered(f"{title}\n{''.join(sentences)}") for title, sentences in record["context"]]
        yield Asking(record["question"], (record["answer"],), tuple(dict.fromkeys(needed)))


SQUAD = DataSet("dev-v2.0.json", "https://rajpurkar.github.io/SQuAD-explorer", _squad, ("data",))
HOTPOTQA = DataSet(
    "hotpot_dev_distractor_v1.json",
    "https://hotpotqa.github.io",
    _hotpotqa,
    ("question", "answer", "context"),
)


@dataclass(frozen=True)
class Library:
    """What was read of a data set.

    Attributes:
      documents: each once.
      order: their numbers, shuffled.
      asking: the questions.
      digest: of the file.
    """

    documents: tuple[str, ...]
    order: tuple[int, ...]
    asking: tuple[Asking, ...]
    digest: str


def read(kind: DataSet, data: Path | None, part: str) -> Library:
    """Reads a data set's file.

    Args:
      kind: which.
      data: the file, or a folder with it.
      part: the sub-task that needs it, for messages.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no such file.
    """
    where = f"fetch {kind.file} from {kind.source} and pass its folder with --task.data"
    if data is None:
        raise FileNotFoundError(f"{part} needs data: {where}, or leave {part} out of --task.subtasks")
    try:
        (path,) = find(data, [kind.file])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; for {part} {where}") from None
    numbers: dict[str, int] = {}
    try:
        found = records(path, kind.fields)
        asking = tuple(kind.read(found, lambda text: numbers.setdefault(text, len(numbers))))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has not the form of {kind.file} ({error!r}); for {part} {where}") from None
    order = list(range(len(numbers)))
    seeded("ruler", kind.file).shuffle(order)
    return Library(tuple(numbers), tuple(order), asking, digest(found))


def question(library: Library, number: int, seed: str) -> Made:
    """A question, by its number, and documents.

    Args:
      library: what was read.
      number: of the question.
      seed: of the example.
    """
    asked = library.asking[number]
    shelf = Shelf(asked, library, seed)
    return Made(asked.answers, "Answer:", shelf, most=len(library.documents) - len(asked.needed))


@dataclass(frozen=True)
class Shelf:
    """A prompt with documents, by the number of those that the question does not need.

    Attributes:
      asked: the question.
      library: what its documents are of.
      seed: of which there are, and of their order.
    """

    asked: Asking
    library: Library
    seed: str

    def __call__(self, count: int) -> str:
        """The prompt with `count` further documents, those of the same article first."""
        needed, near = self.asked.needed, self.asked.near
        first = seeded("ruler", self.seed).randrange(len(self.library.order))
        around = self.library.order[first:] + self.library.order[:first]
        rest = (number for number in around if number not in needed and number not in near)
        chosen = [*needed, *itertools.islice(itertools.chain(near, rest), count)]
        seeded("ruler", self.seed, "order").shuffle(chosen)
        listed = "\n\n".join(
            f"Document {place}\n{self.library.documents[number]}" for place, number in enumerate(chosen, 1)
        )
        ask = "Answer from the documents, with nothing but the answer."
        return f"{ask}\n\n{listed}\n\n{ask}\n\n{self.asked.question.strip()}\n"
