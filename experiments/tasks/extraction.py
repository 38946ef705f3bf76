r"""Finding answers in what a model wrote.

Numbers are read as they are written in text and in LaTeX: thousands between commas or narrow spaces ("9,500",
`9{,}500`, `9\,500`, `70,\!000`), a sign that is a hyphen, a dash or U+2212, decimal digits of any script. A
number that is only a part of an expression (`\frac{1}{2}`, `2^{10}`, "3/4") is no answer: nothing is
calculated. Patterns take linear time on long runs of one character, which models fall into.
"""

import re
import unicodedata

_NUMBER = (
    r"(?:(?<![\w)\]}])-)?(?:\$-?)?(?<!\w)(?<!\d\.)"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?"
)
_BRACE = re.compile(r"\\(?:boxed|framebox|fbox)\s*\{|[{}]")
_IS = (
    r"(?:\s+(?:to|for)\s[^.:\n]{1,40}?)?[*_]*\s*"
    r"(?:(?:is|are|was|equals|(?:would|should|must|will) be)\b|[:=]|[-\u2014]\s)(?!\s*not\b)[\s:]*+"
)
_STATES_NUMBER = re.compile(rf"(?i:\banswers?\b{_IS}|\#{{4}})")
_STATES_CHOICE = rf"(?i:\b(?:answer|option|choice)s?\b{_IS})"
_LEFT_OF_EQUALS = re.compile(
    r"(?:[^=\nA-Za-z.,;(\\]|[.,](?=\d)|\((?=[^=()]*\))|\\(?:[A-Za-z]+|[^A-Za-z\n])"
    r"|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))*+="
)
_STATED_NUMBER = re.compile(rf"[^\d\n.-]{{0,20}}?({_NUMBER})")
_EXPRESSION_BEFORE = re.compile(
    r"(?:[/^][ \t]*\{?|\\[dtc]?frac\s*(?:\{[^{}]*\}\s*)?\{?|\\sqrt\s*(?:\[[^]]*\])?\s*\{?)[ \t]*$"
)
_EXPRESSION_AFTER = re.compile(
    r"[ \t]*(?:\^(?!\s*\{?\s*\\circ)|/[ \t]*[\d(]|[-+*x\u00d7\u00f7\u00b7][ \t]*\$?\d|[eE][-+]?\d"
    r"|\\(?:times|cdot|div|pm|[dtc]?frac|sqrt|pi)(?![a-z]))"
)
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2013\u2212\ufe63\uff0d"), "-")
_THOUSANDS = re.compile(r"(?<=\d)(?:,\\!|\{,\}|\{\\,\}|\\[,;: ]|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_WORDS = re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{[^{}]*[A-Za-z][^{}]*\}")

_ITEM = re.compile(r"(?m)^ ?[*_]*\(?(\d{1,4})[.):][*_]*(?!\d)")
_HEAD = re.compile(
    r"""(?imx)
    ^[\ \t>*_\#-]*                                            # at the beginning of a line
    (?:
      (answers?\s+(?:to|for)(?:\s+the)?(?:\s+question)?|answer|solution|question|problem)
      (?:(?P<low>\\?_)|\\?[\ \#({\[.-]){0,3}
      |([qa])[\ _.]?
    )
    (\d{1,4})\b[)}\]]*[*_`]*[\ \t]*
    (?:(?:[:)]|\.(?!\d))[*_`]*|[-\u2013\u2014](?=\s)|$|(?(low)(?=\s)|(?!)))  # "Answer_1" needs no colon
    |
    (?<=[\s*\#>])(?:[*\#>]{1,6}\ ?)?                          # within a line: with a colon only
    (?:(answer|question)(?:\\?[\ _\#]){0,2}|([qa])_?)
    (\d{1,4})\b[*_`]*\s*:[*_`]*
    """
)


def sections(text: str, count: int) -> list[str]:
    r"""What was written under each of the numbers 1..count: what follows "Answer_i", "Answer i" and the like.

    Headings may be marked up ("**Answer 1:**", `Answer\_1:`), longer ("Answer to Question 1:"), shorter
    ("A1:"), or stand alone on a line ("### Answer 1"). A reply that repeats "Question_i" before its answer is
    read as well: where no "Answer_i" is there, what follows "Question_i" counts. A reply without any such
    heading is read as a numbered list ("1.", "2)"). A number that comes again counts the first time only, so
    that a model that runs on into further rounds does not correct itself; a missing number gives an empty
    section; numbers above `count` end the section before them.
    """
    found: dict[str, dict[int, str]] = {"a": {}, "q": {}, "item": {}}
    heads = [(*_head(match), match) for match in _HEAD.finditer(text)]
    heads = heads or [("item", int(match[1]), match) for match in _ITEM.finditer(text)]
    ends = [*(match.start() for *_, match in heads), len(text)][1:]
    for (kind, number, match), end in zip(heads, ends, strict=True):
        found[kind].setdefault(number, text[match.end() : end].strip())
    parts = found["item"] | found["q"] | found["a"]
    return [parts.get(number, "") for number in range(1, count + 1)]


def number(text: str) -> str | None:
    r"""The final number of a solution, without thousands commas and trailing zeros.

    In this order: the last \boxed{...}, the last number after "answer is" or "####", the last number. Of an
    equation ("5 + 13 = 18") it is the right side. None where what decides is no plain number.
    """
    text = _plain(text)
    inside = boxed(text)
    if inside is not None:
        result = re.split(r"=|\\approx|\u2248", inside)[-1]
        found = list(re.finditer(_NUMBER, alone := _WORDS.sub(" ", result))) or list(
            re.finditer(_NUMBER, alone := result)
        )
        return _whole(alone, *found[0].span()) if len(found) == 1 else None
    for says in reversed(list(_STATES_NUMBER.finditer(text))):
        start = says.end()
        while equation := _LEFT_OF_EQUALS.match(text, start):
            start = equation.end()
        if match := _STATED_NUMBER.match(text, start):
            return _whole(text, *match.span(1))
    found = list(re.finditer(_NUMBER, text))
    return _whole(text, *found[-1].span()) if found else None


def choice(text: str, letters: str) -> str | None:
    r"""The letter of the choice that a solution names, one of `letters`.

    In this order: the last \boxed{...}; the last letter after "answer is", "correct option:" and the like, or
    before "is the correct answer"; a letter in brackets or after "option" if only one is named; a letter that
    stands alone on the first line or begins it like an item. None where two are stated at once ("A or B");
    "not A" states nothing.
    """
    text = _plain(text)
    marks = r"(?:\\[A-Za-z]+\s*\{|[\[{*_`\"'$\s])*+"
    either = letters + letters.lower()
    one = rf"{marks}(?:\(\s*[*_]*([{either}])[*_]*\s*\)|([{letters}])(?!\w))"
    other = rf"(?:\W{{0,4}}\s(?:or|and)\s|/)\W{{0,4}}[{letters}]\b(?!\s+(?:is|are|was)\b)"
    filler = r"(?i:(?:the|option|choice|letter|clearly|definitely|therefore)\s++)*+"
    match = re.match(rf"{marks}\(?{marks}([{either}])(?!\w)", boxed(text) or "")
    if match:
        return match[1].upper()
    noun = r"(?i:the\s+(?:correct|right|best)\s+(?:answer|option|choice))"
    before_noun = rf"(?<!\w)\(?([{letters}])\)?[*_]*\s+is\s+{noun}()()"
    stated = [
        match
        for pattern in (rf"{_STATES_CHOICE}{marks}{filler}{one}({other})?", before_noun)
        for match in re.finditer(pattern, text)
    ]
    if stated:
        last = max(stated, key=lambda match: match.end())
        return None if last[3] else (last[1] or last[2]).upper()
    named = rf"(?:\(([{letters}])\)|\b(?i:option|choice)\s+([{letters}])\b)"
    denied = rf"\bnot\s+{named}|{named}\s+is\s+(?:not|wrong|incorrect|false)\b"
    if found := {bracketed or option for bracketed, option in re.findall(named, text)}:
        return found.pop() if len(found) == 1 and not re.search(denied, text) else None
    match = re.match(rf"[\s*_`\"'$]*([{letters}])[*_`\"'$]*\s*(?:[).:\n]|$)", text)
    return match[1] if match else None


def boxed(text: str) -> str | None:
    r"""The inside, braces balanced, of the last \boxed{...}, \framebox or \fbox that is not empty."""
    found, last, opened = None, -1, []
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(brace.end() if len(brace[0]) > 1 else None)
        elif opened and (start := opened.pop()) is not None and start > last:
            inside = text[start : brace.start()]
            found, last = (inside, start) if inside.strip() else (found, last)
    return found


def plain_number(text: str) -> str:
    """A number as digits: "$1,200.50" and "1200.5" are the same."""
    digits = re.sub(r"[$,]", "", text)
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
    whole, point, rest = digits.partition(".")
    return sign + (whole.lstrip("0") or "0") + point + rest


def _head(match: re.Match) -> tuple[str, int]:
    """Whether a heading is of an answer ("a") or a question ("q"), and its number."""
    name = next(part for part in (match[1], match[3], match[5], match[6]) if part)
    return "a" if name[0] in "aAsS" else "q", int(match[4] or match[7])


def _plain(text: str) -> str:
    """A text with hyphens for dashes and minus signs, ASCII digits, and commas between thousands."""
    text = re.sub(r"[^\W\D]", lambda digit: str(unicodedata.decimal(digit[0])), text.translate(_DASHES))
    return _THOUSANDS.sub(",", text)


def _whole(text: str, start: int, end: int) -> str | None:
    """The number at text[start:end]; None if it is only a part of an expression."""
    if _EXPRESSION_BEFORE.search(text[max(0, start - 40) : start]) or _EXPRESSION_AFTER.match(text, end):
        return None
    return plain_number(text[start:end])
