"""Prompts from a file, replies into another."""

import json
import os
import re

import pytest

from retro_jax import load_model
from retro_jax.experiments.generate import chat
from retro_jax.experiments.generate.many import read_prompts, token_ids
from retro_jax.experiments.io.lines import LineFile, read_lines

FLAGS = ("--slots", 2, "--max-new-tokens", 6, "--budget-tokens", 32, "--page-size", 8, "--window", 2)
DRAWN = ("--temperature", 1.0, "--seed", 3)
PROMPTS = (
    {"prompt": [5, 6, 7]},
    {"prompt": list(range(40)), "max_new_tokens": 11, "id": "long"},
    {"prompt": [9], "max_new_tokens": 1},
    {"prompt": [1, 2], "max_new_tokens": 3, "id": 12},
)


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def prompts(tmp_path):
    return written(tmp_path / "prompts.jsonl", PROMPTS)


def test_lines_are_read(prompts):
    lines = read_prompts(prompts, 6)
    assert [(line.id, line.max_new_tokens) for line in lines] == [(1, 6), ("long", 11), (3, 1), (12, 3)]
    messages = [{"role": "user", "content": "Hello"}]
    (line,) = read_prompts(written(prompts, [{"messages": messages}]), 6)
    assert line.prompt is None and list(line.messages) == messages


@pytest.mark.parametrize(
    ("line", "message"),
    (
        ("{", "line 2 is no JSON"),
        ("[1]", 'line 2 must be an object with "prompt" or "messages"'),
        ('{"id": 4}', 'line 2 must be an object with "prompt" or "messages"'),
        (
            '{"prompt": "a", "messages": []}',
            'line 2 must be an object with "prompt" or "messages", one of them',
        ),
        ('{"prompt": "a", "max_tokens": 5}', "line 2 has 'max_tokens', which is not read; use id, prompt"),
        ('{"prompt": 5}', "line 2 has a prompt that is neither a text nor a list of token ids"),
        ('{"prompt": [1.5]}', "line 2 has a prompt that is neither"),
        ('{"prompt": null}', "line 2 has a prompt that is neither"),
        ('{"messages": [{"role": "user"}]}', "line 2 has messages that are no list of"),
        ('{"messages": []}', "line 2 has messages that are no list of"),
        ('{"prompt": "a", "max_new_tokens": 0}', "line 2 has max_new_tokens 0; it must be a whole number"),
        ('{"prompt": "a", "max_new_tokens": true}', "line 2 has max_new_tokens True"),
        ('{"prompt": "a", "id": null}', "line 2 has the id None"),
        ('{"prompt": [1], "id": "\\ud83d"}', "line 2 has half of a character, '\\ud83d'"),
        ('{"messages": [{"role": "user", "content": "\\ude00"}]}', "line 2 has half of a character"),
        ('{"prompt": "a", "id": 1}', "line 2 has the id 1 of line 1; give each its own"),
    ),
)
def test_what_is_no_prompt_is_refused_by_its_line(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "first"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl line 2") as error:
        read_prompts(path, 6)
    assert message in str(error.value)


def test_a_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl has no prompts"):
        read_prompts(tmp_path / "prompts.jsonl", 6)


def test_replies_go_on_after_any_stop(command, failure, json_command, prompts, tmp_path):
    arguments = ("generate", "random:tiny", "--prompts", prompts, *FLAGS, *DRAWN, "--out")
    out = tmp_path / "a" / "folder" / "replies.jsonl"
    values = json_command(*arguments, out)
    assert (values["replies"], values["were_there"], values["tokens"]) == (4, 0, 21)
    whole = {reply["id"]: reply for reply in read_lines([out], ("id",))}
    lengths = {name: len(reply["tokens"]) for name, reply in whole.items()}
    assert lengths == {1: 6, "long": 11, 3: 1, 12: 3}
    assert all(len(reply["logprobs"]) == lengths[name] for name, reply in whole.items())

    first, second, *_ = out.read_bytes().split(b"\n")
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(first + b"\n" + second[:-9])
    status, said, _ = command(*arguments, torn)
    assert status == 0 and said.startswith(f"4 replies: {torn} (3 of them new: ")
    assert {reply["id"]: reply for reply in read_lines([torn], ("id",))} == whole
    assert torn.read_bytes().startswith(first + b"\n")
    before = torn.read_bytes()
    assert json_command(*arguments, torn)["replies"] == 0

    other = failure(*arguments[:-1], "--page-size", 16, "--out", torn)
    assert re.search(
        "has a reply .* to another prompt, or that was made in another way; choose another", other
    )
    written(prompts, [*PROMPTS[:-1], {"prompt": [1, 3], "max_new_tokens": 3, "id": 12}])
    assert "has a reply 12 to another prompt" in failure(*arguments, torn)
    assert torn.read_bytes() == before


def test_conversations_follow_the_chat_template(tiny_folder, prompts):
    model = load_model(str(tiny_folder))
    messages = [{"role": "user", "content": "abc"}]
    written(prompts, [{"messages": messages}, {"prompt": "abc"}, {"prompt": [5, 6]}])
    lines = read_prompts(prompts, 6)
    expected, plain = chat.prompt(model.tokenizer, messages), model.tokenizer.encode("abc")
    for as_message, second in ((True, expected), (False, plain)):
        ids = token_ids(model, lines, as_message, None)
        assert [ids[number].tolist() for number in (1, 2, 3)] == [expected, second, [5, 6]]
    assert expected != plain


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        ((), "--prompts FILE.jsonl and --out FILE.jsonl belong together"),
        (("--out", "replies.jsonl", "--token-ids", "ids.npy"), "cannot be given with"),
        (("--out", "replies.jsonl", "--verify", 4), "cannot be given with"),
        (("--out", "replies.jsonl", "--slots", 0), "slots 0 must be at least 1"),
        (("--out", "replies.jsonl", "--data-devices", 4), "slots 2 do not divide over data_devices 4"),
        (("--out", "replies.jsonl", "--capacity", 50), "prompt 2 and its new tokens take 51 positions"),
        (("--out", "replies.jsonl", "--chat"), None),
    ),
)
def test_what_cannot_be_is_refused(failure, monkeypatch, prompts, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    if message is None:
        written(prompts, [{"prompt": "Hello"}])
        message = "random:tiny has no tokenizer, so it cannot chat"
    assert message in failure("generate", "random:tiny", "--prompts", prompts, *FLAGS, *flags)
    assert not (tmp_path / "replies.jsonl").exists()


@pytest.mark.parametrize(
    "held", ("notes without an end", '{"prompt": [1]}\n{"prompt": [2]}', '{"id": 1, "prompt": [1]}', "{}\n[")
)
def test_a_file_of_something_else_stays_as_it_is(failure, prompts, tmp_path, held):
    out = tmp_path / "other.txt"
    out.write_text(held)
    said = failure("generate", "random:tiny", "--prompts", prompts, *FLAGS, "--out", out)
    assert "other.txt holds something else than replies; choose another --out" in said
    assert out.read_text() == held


def test_replies_go_into_no_folder_and_not_among_the_prompts(failure, prompts, tmp_path):
    prompts.write_text('{"prompt": [1]}')
    arguments = ("generate", "random:tiny", "--prompts", prompts, *FLAGS, "--out")
    assert "is the file of the prompts; choose another --out" in failure(*arguments, prompts)
    assert prompts.read_text() == '{"prompt": [1]}'
    assert "is a folder; choose a file in it for --out" in failure(*arguments, tmp_path)
    assert "is a file, so" in failure(*arguments, prompts / "replies.jsonl")


def test_an_interrupted_write_leaves_whole_lines(tmp_path, monkeypatch):
    path, real = tmp_path / "lines.jsonl", os.write

    def interrupted(file, data):
        real(file, data[: len(data) // 2])
        raise KeyboardInterrupt

    with LineFile(path) as file:
        file.append([{"id": 1}])
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.append([{"id": 2}])
    assert path.read_bytes() == before
