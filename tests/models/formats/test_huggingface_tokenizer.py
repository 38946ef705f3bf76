"""Which file says what. The expected values are what transformers 5.24's AutoTokenizer makes of the files."""

import logging

import pytest

from retro_jax.models.formats.huggingface_tokenizer import load_tokenizer
from tests.models.byte_tokenizer import byte_backend, write_tokenizer

RECORD = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


def padded(backend):
    backend.enable_padding(length=64, pad_id=1, pad_token="<|im_start|>")


@pytest.mark.parametrize(
    "leave_on",
    [lambda backend: backend.enable_truncation(16), padded],
    ids=["truncation", "padding"],
)
def test_what_training_left_on_is_off(tmp_path, leave_on):
    backend = byte_backend()
    leave_on(backend)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, backend))
    assert tokenizer.encode("x" * 100) == [0, *[90] * 100]
    assert tokenizer.encode("hello") == [0, 74, 71, 78, 78, 81]


@pytest.mark.parametrize(
    ("files", "template_tokens"),
    [
        ({}, {}),
        (
            {"tokenizer_config": {"bos_token": "<|begin|>", "pad_token": "<|im_end|>"}},
            {"bos_token": "<|begin|>", "pad_token": "<|im_end|>"},
        ),
        (
            {
                "special_tokens_map": {
                    "bos_token": "<|begin|>",
                    "eos_token": RECORD | {"content": "<|im_end|>"},
                }
            },
            {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"},
        ),
        (
            {
                "tokenizer_config": {"bos_token": "<|im_start|>"},
                "special_tokens_map": {"bos_token": "<|begin|>"},
            },
            {"bos_token": "<|begin|>"},
        ),
        (
            {
                "tokenizer_config": {
                    "bos_token": "<|im_start|>",
                    "added_tokens_decoder": {"0": RECORD | {"content": "<|begin|>"}},
                },
                "special_tokens_map": {"bos_token": "<|begin|>"},
            },
            {"bos_token": "<|im_start|>"},
        ),
    ],
    ids=["nothing", "config", "map", "map before config", "added_tokens_decoder before map"],
)
def test_names_of_special_tokens(tmp_path, files, template_tokens):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, **files))
    assert tokenizer.template_tokens == template_tokens
    # The post-processor begins each text, whatever is named.
    assert tokenizer.encode("hi") == [0, 74, 75]
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (0, (2,))


def test_padding_names_the_pad_token(tmp_path):
    backend = byte_backend()
    padded(backend)
    assert load_tokenizer(write_tokenizer(tmp_path, backend)).template_tokens == {"pad_token": "<|im_start|>"}


@pytest.mark.parametrize(
    ("single", "add_bos", "ids", "words"),
    [
        ("<|begin|> $A", True, [0, 74, 75], None),
        ("<|begin|> $A", False, [0, 74, 75], "begins each text"),
        ("<|begin|> $A", None, [0, 74, 75], None),
        ("$A", True, [74, 75], "does not begin each text"),
        (None, True, [74, 75], "does not begin each text"),
        (None, False, [74, 75], None),
        ("<|begin|> $A <|im_end|>", None, [0, 74, 75], "ends each text with '<|im_end|>'"),
    ],
)
def test_tokenizer_json_says_whether_texts_begin_with_a_token(tmp_path, caplog, single, add_bos, ids, words):
    settings = {"bos_token": "<|begin|>", "add_bos_token": add_bos}
    folder = write_tokenizer(tmp_path, byte_backend(single), tokenizer_config=settings)
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("hi") == ids
    assert tokenizer.encode("hi", add_bos=True) == [0, 74, 75]
    assert [words in record.getMessage() for record in caplog.records] == ([True] if words else [])


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<new>"}, "added_tokens": {"<new>": 259}},
        {
            "tokenizer_config": {
                "eos_token": "<new>",
                "added_tokens_decoder": {"259": RECORD | {"content": "<new>"}},
            }
        },
    ],
    ids=["added_tokens.json", "added_tokens_decoder"],
)
def test_tokens_that_tokenizer_json_lacks(tmp_path, files):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, **files))
    assert tokenizer.encode("h<new>i", add_bos=False) == [74, 259, 75]
    assert tokenizer.stop_ids == (2, 259)
    assert tokenizer.decode([74, 259]) == "h"


def test_ids_of_added_tokens_that_contradict(tmp_path):
    with pytest.raises(ValueError, match=r"added_tokens\.json gives '<new>' the id 300, tokenizer\.json 259"):
        load_tokenizer(write_tokenizer(tmp_path, added_tokens={"<new>": 300}))


def test_an_end_token_needs_no_special_mark(tmp_path):
    backend = byte_backend()
    backend.add_tokens(["<end>"])
    folder = write_tokenizer(tmp_path, backend, tokenizer_config={"eos_token": "<end>"})
    assert load_tokenizer(folder).stop_ids == (2, 259)


def test_every_stop_id_counts(tmp_path):
    folder = write_tokenizer(tmp_path, generation_config={"eos_token_id": [1, 7]})
    assert load_tokenizer(folder, stop_ids=[9]).stop_ids == (1, 2, 7, 9)


def test_a_named_token_that_does_not_exist(tmp_path, caplog):
    folder = write_tokenizer(tmp_path, tokenizer_config={"eos_token": "<nope>"})
    assert load_tokenizer(folder).stop_ids == (2,)
    assert "has no token '<nope>', which is named eos_token" in caplog.text


def test_special_tokens_split_as_text(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, tokenizer_config={"split_special_tokens": True}))
    assert len(tokenizer.encode("<|im_end|>", add_bos=False)) == 10


def test_several_tokens_before_a_text_are_refused(tmp_path):
    folder = write_tokenizer(tmp_path, byte_backend("<|begin|> <|im_start|> $A"))
    with pytest.raises(ValueError, match="at most one token before and after"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_other_formats_are_named_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} only; tokenizer\.json is needed.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_no_tokenizer_at_all(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_json_that_is_no_object(tmp_path):
    folder = write_tokenizer(tmp_path, tokenizer_config=["bos_token"])
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is broken .*no JSON object"):
        load_tokenizer(folder)


def test_chat_template_by_file_name_and_list(tmp_path, caplog):
    folder = write_tokenizer(
        tmp_path, tokenizer_config={"chat_template": [{"name": "rag", "template": "of the list"}]}
    )
    assert load_tokenizer(folder).chat_template is None
    assert "has the chat templates rag and no default" in caplog.text
    named = {"chat_template": [{"name": "rag", "template": "1"}, {"name": "default", "template": "2"}]}
    assert load_tokenizer(write_tokenizer(tmp_path, tokenizer_config=named)).chat_template == "2"
    (tmp_path / "chat_template.jinja").write_text("3")
    assert load_tokenizer(folder).chat_template == "3"
