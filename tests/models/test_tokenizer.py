import gguf
import pytest

from retro_jax import models
from retro_jax.models.formats.gguf_tokenizer import tokenizer_from_metadata
from tests.models import golden

SHARDED = golden.FOLDER / "llama3.1-sharded"


@pytest.fixture(scope="module")
def from_folder() -> models.Tokenizer:
    return models.load_model(str(SHARDED)).tokenizer


@pytest.fixture
def byte_level_metadata() -> dict:
    return {
        key: field.contents()
        for key, field in gguf.GGUFReader(golden.FOLDER / "gguf-qwen2.gguf").fields.items()
    }


def test_smollm2_ids(smollm2):
    samples = golden.token_samples(golden.FOLDER / "smollm2.tokens.json")
    tokenizer = smollm2.tokenizer
    assert [tokenizer.encode(text) for text in samples["texts"]] == samples["ids"]
    assert tokenizer.chat(samples["messages"]) == samples["chat"]
    expected = golden.smollm2().tokens
    ids = tokenizer.encode(golden.EXCERPT.read_text())
    assert ids[: len(expected)] == expected.tolist()
    assert tokenizer.decode(ids) == golden.EXCERPT.read_text()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids) == (49152, 1, (0, 2))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_every_pre_tokenizer(byte_level_metadata, pre):
    tokenizer = tokenizer_from_metadata(byte_level_metadata | {"tokenizer.ggml.pre": pre}, "a file")
    samples = golden.token_samples(golden.FOLDER / f"gguf-{pre}.tokens.json")
    assert [tokenizer.encode(text) for text in samples["texts"]] == samples["ids"]
    assert tokenizer.stop_ids == (0, 2)


def test_sentencepiece_with_byte_fallback():
    tokenizer = models.load_model(str(golden.FOLDER / "gguf-llama.gguf")).tokenizer
    samples = golden.token_samples(golden.FOLDER / "gguf-llama.tokens.json")
    ids = [tokenizer.encode(text) for text in samples["texts"]]
    assert ids == samples["ids"]
    assert [tokenizer.decode(each) for each in ids] == samples["decoded"]
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (1, (2,))


def test_hugging_face_folder(from_folder):
    samples = golden.token_samples(SHARDED / "tokens.json")
    assert [from_folder.encode(text) for text in samples["texts"]] == samples["ids"]
    assert from_folder.chat(samples["messages"]) == samples["chat"]
    # generation_config.json names 2 and 5, the tokenizer has <|endoftext|> as 0.
    assert from_folder.stop_ids == (0, 2, 5)


def test_begin_of_text_is_never_doubled(from_folder):
    assert from_folder.encode("so")[0] == from_folder.bos_id
    assert from_folder.encode("<|endoftext|>so") == from_folder.encode("so")
    assert from_folder.encode("so", add_bos=False) == from_folder.encode("so")[1:]


def test_special_tokens_are_parsed_and_not_decoded(from_folder):
    ids = from_folder.encode("<|im_start|>so<|im_end|>", add_bos=False)
    assert (ids[0], ids[-1]) == (1, 2)
    assert from_folder.decode(ids) == "so"


def test_chat_without_a_template_is_an_error(from_folder):
    bare = models.Tokenizer(from_folder.backend)
    with pytest.raises(ValueError, match="no chat template"):
        bare.chat([{"role": "user", "content": "Hello"}])


def test_chat_template_may_refuse(from_folder):
    with pytest.raises(ValueError, match="unknown role pirate"):
        from_folder.chat([{"role": "pirate", "content": "Ahoy"}])


def test_chat_template_is_sandboxed(from_folder):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="chat template"):
        models.Tokenizer(from_folder.backend, chat_template=escape).chat([{"role": "user", "content": ""}])


def test_unknown_pre_tokenizer_is_an_error(byte_level_metadata):
    with pytest.raises(ValueError, match=r"'viking'.*smollm.*tokenizer\.json"):
        tokenizer_from_metadata(byte_level_metadata | {"tokenizer.ggml.pre": "viking"}, "a file")


def test_unknown_tokenizer_model_is_an_error(byte_level_metadata):
    with pytest.raises(ValueError, match=r"type 'bert'; gpt2 and llama"):
        tokenizer_from_metadata(byte_level_metadata | {"tokenizer.ggml.model": "bert"}, "a file")


def test_incomplete_tokenizer_is_an_error(byte_level_metadata):
    del byte_level_metadata["tokenizer.ggml.merges"]
    with pytest.raises(ValueError, match=r"a file has an incomplete tokenizer: .*tokenizer\.ggml\.merges"):
        tokenizer_from_metadata(byte_level_metadata, "a file")


def test_token_ids_beyond_the_vocabulary_are_an_error(byte_level_metadata):
    with pytest.raises(ValueError, match="a file has an incomplete tokenizer: list index out of range"):
        tokenizer_from_metadata(byte_level_metadata | {"tokenizer.ggml.bos_token_id": 384}, "a file")


def test_a_file_without_a_tokenizer_has_none(byte_level_metadata):
    bare = {key: value for key, value in byte_level_metadata.items() if not key.startswith("tokenizer.")}
    assert tokenizer_from_metadata(bare, "a file") is None
    assert models.load_model(str(golden.FOLDER / "qwen3")).tokenizer is None


def test_a_file_that_names_no_pre_tokenizer(byte_level_metadata, caplog):
    """llama.cpp's default: punctuation apart, then words, and digits by threes."""
    del byte_level_metadata["tokenizer.ggml.pre"]
    tokenizer = tokenizer_from_metadata(byte_level_metadata, "a file")
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("It's 12345, <so>")
    assert [piece for piece, _ in pieces] == ["It", "'", "s", "Ġ", "123", "45", ",", "Ġ", "<", "so", ">"]
    assert "a file names no pre-tokenizer" in caplog.text


def test_tekken_splits_words_where_case_changes(byte_level_metadata):
    tokenizer = tokenizer_from_metadata(byte_level_metadata | {"tokenizer.ggml.pre": "tekken"}, "a file")
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("helloWorld HTTPServer 12")
    assert [piece for piece, _ in pieces] == ["hello", "World", "ĠHTTPServer", "Ġ", "1", "2"]


def test_gpt4o_keeps_contractions_with_words_and_splits_digits_in_threes(byte_level_metadata):
    tokenizer = tokenizer_from_metadata(byte_level_metadata | {"tokenizer.ggml.pre": "gpt-4o"}, "a file")
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("helloWorld they'LL 12345 a/b//\n")
    expected = ["hello", "World", "Ġthey'LL", "Ġ", "123", "45", "Ġa", "/b", "//Ċ"]
    assert [piece for piece, _ in pieces] == expected


def test_dbrx_splits_as_llama3_and_merges_every_word(byte_level_metadata):
    llama3, dbrx, smaug = (
        tokenizer_from_metadata(byte_level_metadata | {"tokenizer.ggml.pre": pre}, "a file")
        for pre in ("llama-bpe", "dbrx", "smaug-bpe")
    )
    samples = golden.token_samples(golden.FOLDER / "gguf-llama-bpe.tokens.json")
    assert [dbrx.encode(text) for text in samples["texts"]] == samples["ids"]
    assert dbrx.backend.to_str() == smaug.backend.to_str() != llama3.backend.to_str()


@pytest.mark.parametrize(
    ("tokens", "stops"),
    [
        (("<end_of_turn>",), {0, 2, 3}),
        (("<|end|>",), {0, 2, 3}),
        (("<|end|>", "<|return|>"), {0, 2}),
    ],
)
def test_tokens_that_end_a_turn(byte_level_metadata, tokens, stops):
    words = list(byte_level_metadata["tokenizer.ggml.tokens"])
    types = list(byte_level_metadata["tokenizer.ggml.token_type"])
    for place, token in enumerate(tokens, start=3):
        words[place], types[place] = token, 3
    changed = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": types}
    changed |= {"tokenizer.ggml.merges": []}
    assert {*tokenizer_from_metadata(byte_level_metadata | changed, "a file").stop_ids} == stops


def test_names_of_the_same_pre_tokenizer(byte_level_metadata):
    for name, same in (("llama-v3", "llama-bpe"), ("megrez", "qwen2"), ("phi-2", "gpt-2")):
        tokenizers = [
            tokenizer_from_metadata(byte_level_metadata | {"tokenizer.ggml.pre": pre}, "a file")
            for pre in (name, same)
        ]
        assert tokenizers[0].backend.to_str() == tokenizers[1].backend.to_str()


def test_end_of_turn_marked_as_a_word(byte_level_metadata):
    types = list(byte_level_metadata["tokenizer.ggml.token_type"])
    types[2] = 1
    changed = {"tokenizer.ggml.token_type": types, "tokenizer.ggml.eos_token_id": 0}
    assert tokenizer_from_metadata(byte_level_metadata | changed, "a file").stop_ids == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.add_bos_token": True}, "has add_bos_token, but no tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "has 2 entries of tokenizer.ggml.token_type for 384 tokens"),
    ],
)
def test_tables_of_a_gguf_tokenizer_that_contradict(byte_level_metadata, changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_metadata(byte_level_metadata | changes, "a file")


def test_what_templates_of_gguf_files_see(byte_level_metadata):
    tokenizer = tokenizer_from_metadata(
        byte_level_metadata | {"tokenizer.ggml.padding_token_id": 0}, "a file"
    )
    assert tokenizer.template_tokens == {
        "bos_token": "",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def test_an_end_after_each_text_is_reported(byte_level_metadata, caplog):
    tokenizer = tokenizer_from_metadata(
        byte_level_metadata | {"tokenizer.ggml.add_eos_token": True}, "a file"
    )
    assert tokenizer.encode("a")[-1] != 2
    assert "a file ends each text with '<|im_end|>'" in caplog.text


def test_begin_and_end_of_sentencepiece_by_default():
    fields = gguf.GGUFReader(golden.FOLDER / "gguf-llama.gguf").fields.items()
    metadata = {key: field.contents() for key, field in fields}
    bare = {
        key: value for key, value in metadata.items() if not key.endswith(("bos_token_id", "eos_token_id"))
    }
    tokenizer = tokenizer_from_metadata(bare, "a file")
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (1, (2,))
    assert tokenizer.encode("so")[0] == 1
