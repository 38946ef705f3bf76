"""LongBench (Bai et al., arXiv 2308.14508; MIT): long input, short output; six of its English subsets.

Data: SUBSET.jsonl with `input`, `context`, `answers`, or from data.zip on the hub, THUDM/LongBench.
Differences from the original: the wording of the prompts, and a prompt that is too long is an error instead
of being cut.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.tasks.base import Example, Nominal, Task, check_at_least, check_one_of
from experiments.tasks.sources import fetch, find, parse, records, zip_member


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
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004)."""
    ours, theirs = reply.lower().split(), answer.lower().split()
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for index, other in enumerate(theirs, 1):
            before, lengths[index] = (
                lengths[index],
                before + 1 if word == other else max(lengths[index], lengths[index - 1]),
            )
    return 2 * lengths[-1] / (len(ours) + len(theirs)) if lengths[-1] else 0.0


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
        return [max(SUBSETS[self.subset].score(reply.strip(), answer) for answer in example.answers)]
