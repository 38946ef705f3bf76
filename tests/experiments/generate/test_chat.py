import dataclasses
import io

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers

import retro_jax
from retro_jax.experiments.generate import chat
from retro_jax.models import Model, ModelConfig, Tokenizer, random_params

TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and the chat format of SmolLM2."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, eos_token="<|im_end|>", chat_template=TEMPLATE)


@pytest.fixture
def talking(tokenizer, monkeypatch):
    """`load_model` gives a tiny random model with that tokenizer."""
    config = ModelConfig("talker", tokenizer.vocab_size, 2, 4, 2, 8, 32, 64, max_positions=512)
    model = Model(config, random_params(config, jax.random.key(0)), tokenizer)
    monkeypatch.setattr(retro_jax, "load_model", lambda *_, **__: model)
    return model


def text(tokenizer, ids):
    return tokenizer.backend.decode(ids, skip_special_tokens=False)


def test_first_turn(tokenizer):
    assert text(tokenizer, chat.first_turn(tokenizer, "Hi")) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% set content = m.content.split('</think>')[-1].lstrip('\n') "
    "if m.role == 'assistant' else m.content %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def spoken(tokenizer, template, end):
    return Tokenizer(tokenizer.backend, "<s>", end, chat_template=template)


@pytest.mark.parametrize(
    ("template", "reply", "end", "goes_on"),
    [
        (TEMPLATE, "Hello!", "<|im_end|>", True),
        (TEMPLATE, " Hello! ", "<|im_end|>", False),
        (LLAMA3, "Hello!", "<|eot_id|>", True),
        (LLAMA3, "Hello!\n", "<|eot_id|>", False),
        (CHATML, " Hello!\n", "<|im_end|>", True),
        (QWEN3, "Hello!", "<|im_end|>", True),
        (QWEN3, "<think>\nHm.\n</think>\n\nHello!", "<|im_end|>", False),
        (MISTRAL, "Hello!", "</s>", True),
        (ZEPHYR, "Hello!", "</s>", True),
        (CHATML, "A reply that is cut off", "", True),
    ],
)
def test_later_turns_are_the_whole_conversation(tokenizer, template, reply, end, goes_on):
    speaker = spoken(tokenizer, template, "<|im_end|>")
    held = chat.first_turn(speaker, "Hi") + speaker.encode(reply + end)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "Bye"},
    ]
    whole = chat.prompt(speaker, messages)
    assert text(tokenizer, whole) == speaker.chat(messages)
    rest = chat.continuation(whole, held)
    assert (rest is not None) == goes_on
    if goes_on:
        assert held + rest == whole


def test_nothing_is_left_to_continue_by():
    assert chat.continuation([1, 2], [1, 2]) is None
    assert chat.continuation([1], [1, 2]) is None
    assert chat.continuation([1, 2], []) == [1, 2]


def test_one_prompt_is_streamed(talking, command, json_command):
    arguments = ("generate", "talker", "--prompt", "Once", "--max-new-tokens", 20, "--capacity", 300)
    status, out, err = command(*arguments)
    assert status == 0
    assert out == json_command(*arguments)["texts"][0] + "\n"
    assert "20 tokens in" in err


def test_several_prompts(talking, command, json_command):
    fast = ("--max-new-tokens", 8, "--capacity", 300)
    arguments = ("generate", "talker", "--prompt", "Once", "--prompt", "In the end", *fast)
    one, two = json_command(*arguments)["texts"]
    assert command(*arguments)[1] == f"--- 1 ---\n{one}\n--- 2 ---\n{two}\n"


def test_chat_prompt_goes_through_the_template(talking, tokenizer, json_command):
    whole = text(tokenizer, chat.first_turn(tokenizer, "Hi"))
    fast = ("--max-new-tokens", 8, "--capacity", 300)
    by_chat = json_command("generate", "talker", "--chat", "--prompt", "Hi", *fast)
    by_hand = json_command("generate", "talker", "--prompt", whole, *fast)
    plain = json_command("generate", "talker", "--prompt", "Hi", *fast)
    assert by_chat["tokens"] == by_hand["tokens"] != plain["tokens"]


@pytest.mark.parametrize("rewritten", [False, True])
def test_talking_equals_the_whole_conversation(
    talking, tokenizer, command, json_command, monkeypatch, tmp_path, rewritten
):
    template = TEMPLATE.replace("| trim", "| replace('\ufffd', '') | upper") if rewritten else CHATML
    monkeypatch.setattr(tokenizer, "chat_template", template)
    # A reply that reads back as it was said.
    letters = np.arange(tokenizer.vocab_size)
    printable = [tokenizer.encode(chr(code))[0] for code in range(97, 123)]
    head = np.asarray(talking.params.head).copy()
    head[:, ~np.isin(letters, printable)] = 0
    monkeypatch.setattr(
        retro_jax,
        "load_model",
        lambda *_, **__: dataclasses.replace(talking, params=talking.params.replace(head=head)),
    )
    fast = ("--max-new-tokens", 8, "--capacity", 300)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nBye\n"))
    status, out, err = command("generate", "talker", "--chat", *fast)
    assert status == 0, err
    first = json_command("generate", "talker", "--chat", "--prompt", "Hi", *fast)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first["texts"][0]},
        {"role": "user", "content": "Bye"},
    ]
    np.save(tmp_path / "history.npy", chat.prompt(tokenizer, messages))
    second = json_command("generate", "talker", "--token-ids", tmp_path / "history.npy", *fast)
    # input() writes its "> " to stdout when that is no terminal
    assert out.replace("> ", "") == f"{first['texts'][0]}\n{second['texts'][0]}\n"
    assert ("than the cache holds" in err) == rewritten


def test_talking_beyond_the_capacity(talking, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    status, _, err = command("generate", "talker", "--chat", "--capacity", 40, "--max-new-tokens", 8)
    assert status == 2
    assert err.splitlines()[-1].startswith("retro-jax: error: prompt and new tokens take")


def test_talking_is_not_json(talking, failure):
    assert "--json cannot be used to talk" in failure("generate", "talker", "--chat", "--json")
