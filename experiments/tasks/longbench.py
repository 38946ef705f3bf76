"""LongBench (Bai et al., arXiv 2308.14508; MIT): long input, short output; six of its English subsets.

Data: SUBSET.jsonl with `input`, `context`, `answers`, or from data.zip on the hub, THUDM/LongBench.
The metrics are the original's. Differences from it: the wording of the prompts; a prompt that is too long is
an error instead of being cut; a model's reasoning is not graded.
"""

import itertools
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.tasks.base import Example, Nominal, Task, check_at_least, check_one_of
from retro_jax.experiments.tasks.sources import fetch, find, parse, records, zip_member


def words(text: str) -> list[str]:
    """A text's words in lower case, without punctuation and articles, as in SQuAD (arXiv 1606.05250)."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def f1(reply: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words (arXiv 1606.05250)."""
    ours, theirs = words(reply), words(answer)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def rouge_l(reply: str, answer: str) -> float:
    """ROUGE-L of summaries (Lin 2004), as the package `rouge` 1.0.1 counts, which LongBench uses.

    F1 of the different words in any longest common subsequence of two sentences; periods end sentences.
    """
    ours, theirs = ([part.split() or [""] for part in text.split(".") if part] for text in (reply, answer))
    shared = {word for their in theirs for our in ours for word in _common_subsequence(their, our)}
    if not shared:
        return 0.0
    recall, precision = (len(shared) / len(set(itertools.chain(*sentences))) for sentences in (theirs, ours))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _common_subsequence(one: list[str], other: list[str]) -> list[str]:
    """The words of a longest common subsequence; of several, the one that the package chooses."""
    lengths = [[0] * (len(other) + 1)]
    for word in one:
        row, above = [0], lengths[-1]
        for index, another in enumerate(other):
            row.append(above[index] + 1 if word == another else max(above[index + 1], row[-1]))
        lengths.append(row)
    found, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            found.append(one[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def paragraph(reply: str, answer: str) -> float:
    """The share of the numbers in a reply that are the right paragraph's."""
    wanted = re.search(r"\d+", answer)[0]
    found = re.findall(r"\d+", reply)
    return found.count(wanted) / len(found) if found else 0.0


_QUESTION = "Answer the question from the text, as briefly as you can, with no explanation."


@dataclass(frozen=True)
class Subset:
    """A subset: what is asked, the reply's limit, and how it is scored."""

    ask: str
    max_new_tokens: int
    score: Callable[[str, str], float]


SUBSETS = {
    "hotpotqa": Subset(_QUESTION, 32, f1),
    "2wikimqa": Subset(_QUESTION, 32, f1),
    "multifieldqa_en": Subset(_QUESTION, 64, f1),
    "qasper": Subset(f'{_QUESTION} If the text does not say, answer "unanswerable".', 128, f1),
    "passage_retrieval_en": Subset(
        'Which paragraph is the summary below of? Answer with "Paragraph" and its number.', 32, paragraph
    ),
    "gov_report": Subset("Summarise the report in one page.", 512, rouge_l),
}


@dataclass(frozen=True)
class LongBench(Task):
    """A subset of LongBench; the best score over the accepted answers."""

    metric: ClassVar[str] = "score"

    subset: str = "hotpotqa"
    """One of the keys of `SUBSETS` in experiments/tasks/longbench.py."""
    data: Path | None = None
    """SUBSET.jsonl, or a folder with it; None: from the hub."""
    max_prompt_chars: int = 480_000
    """Longer prompts are refused."""

    @property
    def local(self) -> bool:
        """Whether `examples` reads nothing from the network."""
        return self.data is not None

    def check(self) -> None:
        """Raises ValueError if a field is out of its range."""
        check_one_of(self, "subset", tuple(SUBSETS))
        check_at_least(self, 1, "max_prompt_chars")

    def nominal(self) -> Nominal:
        """What the task takes as published: on average 9,000 words of context or fewer."""
        return Nominal(200, 60_000, SUBSETS[self.subset].max_new_tokens)

    def examples(self, seed: int, limit: int | None) -> list[Example]:
        """The questions in the order of the file."""
        name, fields = f"{self.subset}.jsonl", ("input", "context", "answers")
        if self.data:
            found = records(find(self.data, [name])[0], fields)
        else:
            (path,) = fetch("THUDM/LongBench", ["data.zip"])
            found = parse(zip_member(path, f"data/{name}"), ".jsonl", name)
        subset = SUBSETS[self.subset]
        examples = []
        for index, record in enumerate(found[:limit]):
            question = f"\n\n{record['input'].strip()}" if record["input"].strip() else ""
            prompt = f"{record['context'].strip()}\n\n{subset.ask}{question}"
            if len(prompt) > self.max_prompt_chars:
                raise ValueError(
                    f"{name} record {index + 1} has {len(prompt)} characters, over task.max_prompt_chars "
                    f"{self.max_prompt_chars}; raise it or lower --limit"
                )
            examples.append(
                Example(
                    id=f"{self.subset}-{index:03}",
                    prompt=prompt,
                    answers=tuple(record["answers"]),
                    max_new_tokens=subset.max_new_tokens,
                    chat=True,
                )
            )
        return examples

    def grade_reply(self, example: Example, reply: str) -> list[float]:
        """One score, the best over the accepted answers."""
        return [max(SUBSETS[self.subset].score(reply, answer) for answer in example.answers)]
