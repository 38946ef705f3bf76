"""Finding answers in what a model wrote."""

import re

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
_SAYS = r"answer\s*(?:is|:|=)\s*:?\s*"
_BOXED = r"\\boxed\s*\{"


def sections(text: str, count: int) -> list[str]:
    """What was written under each of the numbers 1..count: what follows "Answer_i", "Answer i" and the like.

    A reply that repeats "Question_i" before its answer is read as well: where no "Answer_i" is there, what
    follows "Question_i" counts. A number that comes again counts the first time only, so that a model that
    runs on into further rounds does not correct itself; a missing number gives an empty section; numbers
    above `count` end the section before them.
    """
    heads = list(
        re.finditer(
            r"(?im)(?:^|(?<=[\s*#>]))[*#>\s]*(answer|question|q|a)[ _#]{0,2}(\d+)\b\s*[*_]*\s*[:.)]", text
        )
    )
    found: dict[str, dict[int, str]] = {"answer": {}, "question": {}}
    ends = [*(head.start() for head in heads), len(text)][1:]
    for head, end in zip(heads, ends, strict=True):
        kind = {"a": "answer", "q": "question"}.get(head[1].lower(), head[1].lower())
        found[kind].setdefault(int(head[2]), text[head.end() : end].strip())
    return [found["answer"].get(number, found["question"].get(number, "")) for number in range(1, count + 1)]


def number(text: str) -> str | None:
    r"""The final number of a solution, without thousands commas and trailing zeros.

    In this order: the last \boxed{...}, the first number after "answer is", the last number.
    """
    inside = boxed(text)
    for candidate in (inside, _after_says(text, _NUMBER), _last(text, _NUMBER)):
        match = re.search(_NUMBER, candidate or "")
        if match:
            return plain_number(match[0])
    return None


def choice(text: str, letters: str) -> str | None:
    r"""The letter of the choice that a solution names, one of `letters`.

    In this order: the last \boxed{...}, the first letter after "answer is", a letter in brackets if only one
    is named, a letter that stands alone on the first line or begins it like an item.
    """
    one = rf"(?:\\text\s*\{{)?[(\[*\s]*([{letters}])\b"
    match = re.match(one, boxed(text) or "")
    if match:
        return match[1]
    match = re.search(rf"(?i:{_SAYS}|choice is\s*|option\s*)\**\s*{one}", text)
    if match:
        return match[1]
    named = set(re.findall(rf"\(([{letters}])\)", text))
    if named:
        return named.pop() if len(named) == 1 else None
    match = re.match(rf"[\s*]*([{letters}])[*]*\s*(?:[).:\n]|$)", text)
    return match[1] if match else None


def boxed(text: str) -> str | None:
    r"""The inside of the last \boxed{...}, its braces balanced."""
    starts = [match.end() for match in re.finditer(_BOXED, text)]
    for start in reversed(starts):
        depth = 1
        for index in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start:index]
    return None


def plain_number(text: str) -> str:
    """A number as digits: "$1,200.50" and "1200.5" are the same."""
    digits = re.sub(r"[$,]", "", text)
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
    return sign + (digits.lstrip("0") or "0" if "." not in digits else digits)


def _after_says(text: str, what: str) -> str | None:
    match = re.search(rf"(?i){_SAYS}[^\d\n-]{{0,20}}({what})", text)
    return match[1] if match else None


def _last(text: str, what: str) -> str | None:
    found = re.findall(what, text)
    return found[-1] if found else None
