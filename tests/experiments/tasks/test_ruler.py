import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from retro_jax.experiments.tasks import Filled
from retro_jax.experiments.tasks.needles import TEXT
from retro_jax.experiments.tasks.ruler import RULER, SUBTASKS
from retro_jax.experiments.tasks.ruler.material import PAIRS
from retro_jax.experiments.tasks.ruler.task import MADE_BY_CODE

LENGTH = 2048


def words(example):
    return len(f"{example.prompt} {example.reply}".split())


def made(name, seed=0, length=LENGTH, count=1, **task):
    """The last of `count` examples of a sub-task, filled up to a length in words."""
    examples = RULER((name,), length=length, count=count, **task).examples(seed, None)
    return examples[-1].fitted(words)


@pytest.mark.parametrize("name", MADE_BY_CODE)
def test_prompts_are_as_long_as_there_is_room_and_hold_the_answers(name):
    example = made(name)
    room = LENGTH - SUBTASKS[name].max_new_tokens
    assert room - 7 < words(example) <= room  # no piece has more than seven words
    assert all(answer in example.prompt for answer in example.answers)
    assert example == made(name)
    others = [made(name, seed=1), made(name, count=2)]
    assert all(other.answers != example.answers and other.prompt != example.prompt for other in others)
    assert others[1].id == f"{name}-0001" and others[1].part == name


@pytest.mark.parametrize("name", MADE_BY_CODE)
def test_the_score_is_the_share_of_the_answers_that_the_reply_has(name):
    task, example = RULER(), made(name, length=1024)
    answers = [answer.upper() for answer in example.answers]
    assert task.grade(example, f"<think>none</think>{' and '.join(answers)}.") == [1.0]
    assert task.grade(example, f"{answers[0]}, {answers[0]}") == [1 / len(answers)]
    assert task.grade(example, f"<think>{', '.join(answers)}") == task.grade(example, "") == [0.0]


def test_the_number_of_needles_and_of_answers_is_the_published_one():
    shown = {
        name: (len(re.findall(r"The secret \w+ of \S+ is \S+\.", made(name).prompt)), len(made(name).answers))
        for name in MADE_BY_CODE
        if name.startswith("niah")
    }
    among = {name: shown.pop(name) for name in ("niah_multikey_2", "niah_multikey_3")}
    assert all(needles > 100 and answers == 1 for needles, answers in among.values())
    assert shown == {
        "niah_single_1": (1, 1),
        "niah_single_2": (1, 1),
        "niah_single_3": (1, 1),
        "niah_multikey_1": (4, 1),
        "niah_multivalue": (4, 4),
        "niah_multiquery": (4, 4),
    }


@pytest.mark.parametrize("name", ("niah_multikey_2", "niah_multikey_3", "niah_multiquery", "niah_multivalue"))
def test_a_question_has_no_other_answers(name):
    example = made(name)
    told = re.findall(r"The secret \w+ of (\S+) is (\S+)\.", example.prompt)
    asked = example.prompt.splitlines()[-1]
    assert sorted(value for key, value in told if f" {key}" in asked) == sorted(example.answers)
    keys = Counter(key for key, _ in told)
    assert max(keys.values()) == (4 if name == "niah_multivalue" else 1)


def test_needles_lie_between_the_sentences_of_a_novel():
    example = made("niah_multikey_1")
    text = example.prompt.split("\n\n")[1]
    needle = re.compile(r"(?:^| )The secret number of \S+ is \d{7}\.")
    before = [text[: match.start()] for match in needle.finditer(text)]
    assert len(before) == 4 and all(part[-2:].strip('"')[-1:] in tuple(".!?") for part in before if part)
    assert " ".join(TEXT.read_text().split()).startswith(needle.sub("", text).strip())


def test_variables_are_a_chain_in_the_order_of_the_text():
    example = made("vt")
    solved, asked = example.prompt.split("In the text below")[1:]
    for part, size in ((solved, 3), (asked, 5)):
        statements = re.findall(r"VAR (\w+) = (\w+)\.", part)
        names, given = zip(*statements, strict=True)
        value = re.search(r"have the value (\d+)", part)[1]
        assert given == (value, *names[:-1]) and {len(name) for name in names} == {size}
    assert names == example.answers and f"value {value}:" in example.reply
    assert solved.rstrip().endswith(".") and "There are 5 variables" in solved


@pytest.mark.parametrize(("length", "often", "seldom"), ((LENGTH, 6, 1), (8192, 30, 3)))
def test_common_words_come_as_often_as_published(length, often, seldom):
    example = made("cwe", length=length)
    solved, asked = example.prompt.split("Some words of the list")[1:]
    counts = Counter(re.findall(r"\d+\. (\S+)", asked))
    assert {counts.pop(answer) for answer in example.answers} == {often}
    assert set(counts.values()) == {seldom} and len(example.answers) == 10
    assert not counts.keys() & set(re.findall(r"\d+\. (\S+)", solved))


def test_coded_words_follow_zipfs_law():
    example = made("fwe", length=8192)
    counts = Counter(example.prompt.split("\n\n")[1].split())
    (dots, most), *ranked = counts.most_common()
    assert dots == "..." and tuple(word for word, _ in ranked[:3]) == example.answers
    assert [round(most / count) for _, count in ranked[:4]] == [4, 9, 16, 25]
    assert {len(word) for word, _ in ranked} == {6} and len(ranked) > 40


def test_no_word_is_found_within_another():
    text = " ".join(PAIRS)
    assert len(PAIRS) > 20_000
    qualities, things = (sorted(set(part)) for part in zip(*(pair.split("-") for pair in PAIRS), strict=True))
    assert not [(a, b) for a in qualities for b in qualities if a != b and b.endswith(a)]
    assert not [(a, b) for a in things for b in things if a != b and b.startswith(a)]
    assert text.isascii()


@pytest.fixture
def data(tmp_path):
    """The published files in small: six articles of five paragraphs, and three questions of four."""
    squad = []
    for article in range(6):
        paragraphs = []
        for number in range(5):
            asked = {
                "question": f"Who {article} {number}?",
                "answers": [{"text": "Ann Lee"}, {"text": "Ann"}],
            }
            impossible = {"question": "Why?", "answers": [], "is_impossible": True}
            context = f"article {article} paragraph {number} " + "word " * 40
            paragraphs.append({"context": context, "qas": [asked | {"is_impossible": False}, impossible]})
        squad.append({"title": str(article), "paragraphs": paragraphs})
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": squad}))
    hotpot = [
        {
            "question": f"Which {number}?",
            "answer": "Paris",
            "context": [[f"title {number} {other}", ["One. ", "Two. " * 40]] for other in range(4)],
        }
        for number in range(9)
    ]
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))
    return tmp_path


def test_questions_lie_among_documents_of_the_data_set(data):
    example = made("qa_1", data=data, length=512, count=4)
    article, number = re.search(r"Who (\d) (\d)\?", example.prompt).groups()
    found = re.findall(r"Document (\d+)\narticle (\d) paragraph (\d)", example.prompt)
    assert [int(place) for place, *_ in found] == list(range(1, len(found) + 1)) and 6 < len(found) < 12
    assert (article, number) in {(own, of) for _, own, of in found} and len(set(found)) == len(found)
    assert Counter(own for _, own, _ in found)[article] == 5  # all of its own article, then others
    assert RULER().grade(example, "It was ann.") == [1.0] and RULER().grade(example, "Bob") == [0.0]

    example = made("qa_2", data=data, length=512)
    number = re.search(r"Which (\d)\?", example.prompt)[1]
    assert all(f"title {number} {other}\nOne. Two. " in example.prompt for other in range(4))
    assert example.answers == ("Paris",)


def test_questions_need_their_data(data, tmp_path):
    assert not RULER().local and RULER(data=data).local and RULER(MADE_BY_CODE).local
    missing = (
        r"qa_1 needs data: fetch dev-v2\.0\.json from https://rajpurkar.*leave qa_1 out of --task\.subtasks"
    )
    with pytest.raises(FileNotFoundError, match=missing):
        RULER().examples(0, None)
    (data / "dev-v2.0.json").rename(data / "dev.json")
    with pytest.raises(FileNotFoundError, match=r"no file that matches dev-v2\.0\.json.*fetch dev-v2"):
        made("qa_1", data=data)
    with pytest.raises(ValueError, match=r"record 1 has no 'question'"):
        made("qa_2", data=data / "dev.json")
    (data / "dev.json").write_text(json.dumps({"data": [{"title": "x"}]}))
    with pytest.raises(ValueError, match=r"has not the form of dev-v2\.0\.json \(KeyError\('paragraphs'\)\)"):
        made("qa_1", data=data / "dev.json")
    with pytest.raises(ValueError, match=r"has 9 questions, fewer than task\.count 10; lower it"):
        made("qa_2", data=data, count=10)
    with pytest.raises(ValueError, match=r"qa_2-0000 takes \d+ tokens with all 32 pieces that can fill it"):
        made("qa_2", data=data, length=4096)


def test_needles_lie_in_a_text_of_ones_own(tmp_path):
    (tmp_path / "own.txt").write_text("A short sentence of mine. " * 5)
    for where in (tmp_path, tmp_path / "own.txt"):
        example = made("niah_single_2", data=where)
        assert example.prompt.count("of mine.") > 300  # again and again
    novel = made("niah_single_2")
    assert example.told()["data"] != novel.told()["data"] and example.answers == novel.answers
    json.dumps(example.told())
    with pytest.raises(
        FileNotFoundError, match=r"there is no file or folder .*no\.txt; correct --task\.data"
    ):
        made("niah_single_2", data=tmp_path / "no.txt")


def test_a_long_prompt_is_measured_few_times():
    (example,) = RULER(("niah_single_2",), length=131072, count=1).examples(0, None)
    measured = []

    def tokens(filled):
        measured.append(words(filled))
        return measured[-1]

    assert words(example.fitted(tokens)) == 131072 - 128 and len(measured) < 10


@pytest.mark.timeout(20)
def test_needles_have_keys_of_their_own_or_are_refused():
    with pytest.raises(ValueError, match=f"words for {len(PAIRS) - 1} needles .* lower it"):
        made("niah_multikey_2", length=10 * len(PAIRS))


def test_what_cannot_be_filled_to_its_length_is_refused():
    example = Filled(
        id="a", prompt="", part="p", max_new_tokens=4, length=20, fill=lambda n: "word " * n, most=9
    )
    with pytest.raises(ValueError, match=r"a takes 13 tokens with all 9 pieces .* below task\.length 20"):
        example.fitted(words)
    assert words(replace(example, most=17).fitted(words)) == 16
    with pytest.raises(ValueError, match=r"a takes 21 tokens at least, over task\.length 20; raise it"):
        replace(example, least=17).fitted(words)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            RULER(("niah_single_4",)),
            r"task\.subtasks 'niah_single_4' is unknown \(did you mean 'niah_single_",
        ),
        (RULER(()), r"task\.subtasks is empty: name at least one"),
        (RULER(("vt", "vt")), r"task\.subtasks vt, vt: name at least one, and each once"),
        (RULER(length=511), r"task\.length 511 is below 512"),
        (RULER(count=0), r"task\.count 0 is below 1"),
    ],
)
def test_fields_out_of_range(task, message):
    with pytest.raises(ValueError, match=message):
        task.check()


def test_a_limit_takes_the_sub_tasks_by_turns():
    found = RULER(("vt", "fwe"), count=3).examples(0, 3)
    assert [example.id for example in found] == ["vt-0000", "fwe-0000", "vt-0001"]
