import pytest

from retro_jax.experiments.tasks.base import final_reply
from retro_jax.experiments.tasks.extraction import boxed, choice, number, plain_number, sections


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer_1:\n2+2=4\nAnswer_2: 5\n", ["2+2=4", "5"]),
        ("**Answer 1:** a\n\n**Answer 2:** b", ["a", "b"]),
        ("Sure!\n1. skipped\nAnswer_2: b", ["", "b"]),
        ("Answer_1: a\nAnswer_1: other\nAnswer_2: b", ["a", "b"]),
        ("Answer_2: b\nAnswer_1: a", ["a", "b"]),
        ("Answer_1: a\nAnswer_2: b\nAnswer_3: c\nAnswer_1: z", ["a", "b"]),
        ("Question_1: what?\nAnswer_1: a\nQuestion_2: why?\nAnswer_2: b", ["a", "b"]),
        ("Question 1: so 3\nQuestion 2: so 4", ["so 3", "so 4"]),
        ("### Answer_1: a ### Answer_2: b", ["a", "b"]),
        ("answer 1) a\nANSWER 2) b", ["a", "b"]),
        ("Answer_12: no", ["", ""]),
        ("The answer is 1: but Answer_1: a", ["a", ""]),
        ("Answer_1: it mixes at a 3:1 ratio.\nAnswer_2: b", ["it mixes at a 3:1 ratio.", "b"]),
        ("Answer_1: so the answer 7. It is 1.\nAnswer_2: b", ["so the answer 7. It is 1.", "b"]),
        ("Answer 1.5 is no heading\nA1: a\nA2: b", ["a", "b"]),
        ("1. a\n   1. a step\n2. b\n3. c", ["a\n   1. a step", "b"]),
        ("", ["", ""]),
    ],
)
def test_sections(text, expected):
    assert sections(text, 2) == expected


@pytest.mark.parametrize(
    "heading",
    [
        *(
            "Answer_1:",
            "Answer 1:",
            "**Answer 1:**",
            "**Answer_1**:",
            r"Answer\_1:",
            "Answer #1:",
            "Answer_{1}:",
        ),
        *("Answer to Question 1:", "Answers to question 1)", "Answer-1:", "Answer(1):", "Answer_01:", "A1:"),
        *(
            "### Answer_1\n",
            "Answer_1",
            "**Answer 1**\n",
            "Answer 1 -",
            "- Answer 1 \N{EM DASH}",
            "Solution 1.",
        ),
        *("1.", "1)", "(1)", "**1.**", "Problem 1:", "> **Question 1:**"),
    ],
)
def test_headings(heading):
    text = f"Here they are.\n\n{heading} It is 7 + 5.\n\n{heading.replace('1', '2')} The answer is 12.\n"
    assert sections(text, 3) == ["It is 7 + 5.", "The answer is 12.", ""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So 3 and 4. The answer is 7.", "7"),
        ("The answer is 7. The answer is 8.", "8"),
        ("The answer is not 7. The answer is 8, not 9.", "8"),
        ("The answer is 8. It is not 9.", "8"),
        ("The answer is: $1,234.50 in all", "1234.5"),
        ("The answer is **42**", "42"),
        ("**Answer:** **18**", "18"),
        ("*18* (rounded)", "18"),
        ("The answer to the second question is 18!", "18"),
        ("The answer is\n\n18", "18"),
        ("3 x 5 = 15", "15"),
        ("So 18. The answer is 5 + 13 = 18.", "18"),
        ("The answer is 18. Check: 3 + 4 = 7", "18"),
        ("The answer is 18 apples, 3 each.", "18"),
        ("The answer is $3 \\times 6 = 18$ (x = 3)", "18"),
        ("The answer is 5 + 13.", None),
        ("The answer is 3/4.", None),
        ("24/7\n#### 72\n\nQuestion 3", "72"),
        ("it is \\boxed{\\frac{1}{2}} no, \\boxed{ 073 }", "73"),
        ("The final answer is x = -5.", "-5"),
        ("The answer is \N{MINUS SIGN}5.", "-5"),
        ("The answer is $-3$", "-3"),
        ("from pages 3-5", "5"),
        ("10.00", "10"),
        ("it costs .50", "0.5"),
        ("0", "0"),
        ("H2O and CO2", None),
        ("no digits", None),
        *((rf"\boxed{{{it}}}", "9500") for it in ("9500", "9,500", "9{,}500", r"\$9{,}500", r"9\,500")),
        *((rf"It is {n}.", "70000") for n in (r"70,\!000", r"70\ 000", "70~000", "70\N{THIN SPACE}000")),
        ("The answer is $70{,}000$.", "70000"),
        ("\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT EIGHT}", "18"),
        *((rf"\boxed{{{it}}} 2", "18") for it in (r"18\text{ dollars}", r"\text{18}", "x = 18", r"18^\circ")),
        *((rf"\boxed{{{it}}} 2", "18") for it in (r"18\%", "18.", r"\mathbf{018}", r"18 \text{ (in 2 h)}")),
        *((rf"\boxed{{{it}}} 1", None) for it in (r"\frac{1}{2}", "2^{10}", r"1\frac12", "3, 5", r"2\sqrt3")),
        *((rf"\{box}{{204}} or 5", "204") for box in ("framebox", "fbox")),
        (r"\boxed{7}. Put it into \boxed{}.", "7"),
    ],
)  # fmt: skip
def test_number(text, expected):
    assert number(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "The answer is (B).",
            "The answer is B",
            "ANSWER: B",
            "**Answer: B**",
            "**Answer:** B",
            "Answer - B",
        ),
        *(
            "the answer is `B`",
            "Answer: $B$",
            "The answer is: **B) Paris**",
            "The correct answer is\n\n(B) Paris",
        ),
        *(
            "The correct option is B.",
            "Correct option: B",
            "The answer is option B",
            "the best choice is (B)",
        ),
        *(
            "The answer is [B]",
            "The answer is (b).",
            "The answer is\N{NO-BREAK SPACE}B.",
            "(B) is the right choice",
        ),
        *("A good question. The answer is (B).", "The answer is not A. The answer is B.", "It is option B"),
        *("Answer: A? No: the answer is B. Option C is wrong.", "The answer is B and A is wrong."),
        *("(A) is wrong since... The answer is (B). (C) too.", "it must be (B), surely (B)"),
        *(rf"\boxed{{{it}}} The answer is A" for it in ("B", r"\text{(B)}", r"\textbf{(B)}", r"\mathrm{B}")),
        *("B", "B. because", "B) because", "(B) because A is wrong", "**B**", "`B`"),
    ],
)
def test_choice(text):
    assert choice(text, "ABCD") == "B"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "(A) or (B)",
            "The answer is A or B",
            "The answer is **A** or **B**.",
            "So (A) is wrong and (B) is right.",
        ),
        *("The answer is not A.", "The answer is not (A).", "Option A is wrong.", "A dog is an animal"),
        *("The answer is Because", "The answer is (E).", ""),
    ],
)
def test_no_choice(text):
    assert choice(text, "ABCD") is None


@pytest.mark.parametrize(
    "run", [" ", "\n", "*", "-", "$", "(", "\\a", "/ ", "1", "1,", "# ", "\\boxed{", "the "]
)
def test_long_runs_take_no_long_time(run):
    text = f"The answer is {run * 20_000} 7x or A"
    assert number(text) != "0" and choice(text, "ABCD") != "D" and sections(text, 1) != ["0"]


def test_boxed_braces_are_balanced():
    assert boxed("a \\boxed{x^{2}+{1}} b") == "x^{2}+{1}"
    assert boxed("\\boxed{1} \\boxed{2") == "1"
    assert boxed("} \\boxed{\\boxed{2}3}") == "2"


@pytest.mark.parametrize(
    ("text", "digits"),
    [("007", "7"), ("-0.50", "-0.5"), (".5", "0.5"), ("$1,200.50", "1200.5"), ("000", "0")],
)
def test_plain_numbers(text, digits):
    assert plain_number(text) == digits


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("5", "5"),
        ("<think>4?</think>5", "5"),
        ("4?</think>5", "5"),  # the chat template had begun it
        ("<think>3</think>4<think>4?</think>5", "5"),
        ("<think>4? The answer is", ""),
        ("5<think>4?", "5"),
        ("<think>3</think>5<think>4?", "5"),
    ],
)
def test_reasoning_is_no_part_of_a_reply(text, reply):
    assert final_reply(text) == reply
