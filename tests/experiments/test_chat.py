import io

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers

import retro_jax
from experiments import chat
from models import Model, ModelConfig, Tokenizer, random_params

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


def test_turns_join_to_the_whole_conversation(tokenizer):
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    whole = tokenizer.encode(tokenizer.chat(conversation))
    reply = tokenizer.encode("Hello!")
    (end,) = tokenizer.stop_ids
    ended = chat.first_turn(tokenizer, "Hi") + reply + [end] + chat.next_turn(tokenizer, "Bye", pending=end)
    cut_off = chat.first_turn(tokenizer, "Hi") + reply + chat.next_turn(tokenizer, "Bye", pending=reply[-1])
    assert ended == whole
    assert cut_off == whole


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


def test_talking_goes_on_from_the_cache(talking, tokenizer, command, json_command, monkeypatch, tmp_path):
    fast = ("--max-new-tokens", 8, "--capacity", 300)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nBye\n"))
    status, out, err = command("generate", "talker", "--chat", *fast)
    assert status == 0, err
    first = json_command("generate", "talker", "--chat", "--prompt", "Hi", *fast)
    history = chat.first_turn(tokenizer, "Hi") + first["tokens"][0]
    history += chat.next_turn(tokenizer, "Bye", pending=first["tokens"][0][-1])
    np.save(tmp_path / "history.npy", history)
    second = json_command("generate", "talker", "--token-ids", tmp_path / "history.npy", *fast)
    # input() writes its "> " to stdout when that is no terminal
    assert out.replace("> ", "") == f"{first['texts'][0]}\n{second['texts'][0]}\n"


def test_talking_beyond_the_capacity(talking, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    status, _, err = command("generate", "talker", "--chat", "--capacity", 40, "--max-new-tokens", 8)
    assert status == 2
    assert err.splitlines()[-1].startswith("retro-jax: error: prompt and new tokens take")


def test_talking_is_not_json(talking, failure):
    assert "--json cannot be used to talk" in failure("generate", "talker", "--chat", "--json")
