"""Short questions with answers, from GSM8K, MMLU and CommonsenseQA: records of all forms become `Question`s.

- GSM8K (Cobbe et al., arXiv 2110.14168; MIT): .jsonl with `question` and `answer`, whose last line is
  "#### number".
- MMLU (Hendrycks et al., arXiv 2009.03300; MIT): folders `dev`, `test` of CSV files without a header, one per
  subject; or records with `question`, `choices`, `answer` (an index), `subject`.
- CommonsenseQA (Talmor et al., arXiv 1811.00937; MIT): .jsonl with `question.stem`, `question.choices`,
  `answerKey`; or records with `question`, `choices` of `label` and `text`, `answerKey`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from retro_jax.experiments.tasks.sources import fetch, find, records

LETTERS = "ABCDEFGHIJ"
MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
      text: with its choices, one a line, if it has any.
      answer: a number, or the letter of a choice.
      worked: the way to the answer where the data has one, else empty.
      subject: of an MMLU question, else empty.
    """

    text: str
    answer: str
    worked: str = ""
    subject: str = ""

    @property
    def solution(self) -> str:
        """What a good reply says."""
        final = f"({self.answer})" if self.answer in LETTERS else self.answer
        return f"{self.worked}\nThe answer is {final}.".strip()


def gsm8k(data: Path | None, split: str) -> list[Question]:
    """Problems of GSM8K's "train" or "test"."""
    paths = (
        find(data, [f"{split}*.jsonl", f"{split}*.parquet"])
        if data
        else fetch("openai/gsm8k", [f"main/{split}-00000-of-00001.parquet"])
    )
    return [_gsm8k(record, path) for path in paths for record in records(path, ("question", "answer"))]


def mmlu(data: Path | None, split: str) -> list[Question]:
    """Questions of MMLU's "dev" or "test", by subject."""
    if data is None:
        (path,) = fetch("cais/mmlu", [f"all/{split}-00000-of-00001.parquet"])
        return [
            _choice(record["question"], record["choices"], LETTERS[record["answer"]], record["subject"])
            for record in records(path, ("question", "choices", "answer", "subject"))
        ]
    return [
        _choice(
            record["question"],
            [record[letter] for letter in "ABCD"],
            record["answer"],
            path.stem.removesuffix(f"_{split}"),
        )
        for path in find(data, [f"{split}/*.csv", f"*_{split}.csv"])
        for record in records(path, MMLU_COLUMNS, header=MMLU_COLUMNS)
    ]


def commonsenseqa(data: Path | None, split: str) -> list[Question]:
    """Questions of CommonsenseQA's "train" or "dev"; its test split has no answers."""
    if data:
        paths = find(data, [f"{split}*.jsonl", f"{split}*.parquet"])
    else:
        name = {"dev": "validation"}.get(split, split)
        paths = fetch("tau/commonsense_qa", [f"data/{name}-00000-of-00001.parquet"])
    return [_commonsenseqa(record) for path in paths for record in records(path, ("question", "answerKey"))]


def _gsm8k(record: dict, path: Path) -> Question:
    worked, mark, answer = record["answer"].rpartition("####")
    if not mark:
        raise ValueError(f"{path}: the answer {record['answer']!r} has no '####'; is this GSM8K?")
    # The data marks each calculation for a calculator: <<16-3-4=9>>.
    return Question(
        record["question"].strip(), answer.strip().replace(",", ""), re.sub(r"<<.*?>>", "", worked).strip()
    )


def _commonsenseqa(record: dict) -> Question:
    question, choices = record["question"], record.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):  # columns, as in the hub's files
        choices = [
            {"label": label, "text": text}
            for label, text in zip(choices["label"], choices["text"], strict=True)
        ]
    return _choice(question, [choice["text"] for choice in choices], record["answerKey"])


def _choice(text: str, choices: list[str], answer: str, subject: str = "") -> Question:
    lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return Question("\n".join([text.strip(), *lines]), answer.strip(), subject=subject.replace("_", " "))
