"""The tokenizers of the golden models, and samples encoded by the libraries that they come from."""

import io
import json
from pathlib import Path

import gguf
import sentencepiece
import tokenizers
from tokenizers import decoders, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tests.models.reference_bpe import encode_with_special

GOLDEN = Path(__file__).parent / "golden"
TEXT = (GOLDEN / "middlemarch.txt").read_text()
SAMPLES = [
    "Hello world, it's 2024! They've 1234567 tokens; I'll go.",
    "  two  spaces   three\n\n\nnewlines\r\n\ttabs \t mixed   ",
    "naïve café Ünïcödé Привет мир 你好世界 こんにちは ½ ² Ⅷ ٣٤",
    "emoji 😀👍🏽 and math ∑∫√ € £ “quotes” — dash…",
    "def f(x):\n    return x**2  # comment\n",
    "<|im_start|>user\nWhat's 12 + 345?<|im_end|>\n<|im_start|>assistant\n",
    "e\u0301 is not é; DON'T SHOUT'S",
    "",
    " ",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is 7 > 6?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": 'Say "so" & <stop>.'},
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message.role not in ['system', 'user', 'assistant'] %}\n"
    "        {{ raise_exception('unknown role ' + message.role) }}\n    {% endif %}\n"
    "{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}\n"
    "{% endfor %}\n{{ {'n': messages | length, 'text': messages[-1].content} | tojson }}\n"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)


def train_bpe(splitter) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def make_tokenizer(folder: Path) -> None:
    backend = train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=[2, 5]).save_pretrained(folder)
    reloaded = AutoTokenizer.from_pretrained(folder)
    write_samples(
        folder / "tokens.json",
        [reloaded(text)["input_ids"] for text in SAMPLES],
        chat=reloaded.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True),
    )


def write_samples(path: Path, ids: list[list[int]], **more) -> None:
    record = {"texts": SAMPLES, "ids": ids, "messages": MESSAGES, **more}
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1))


def write_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """A SentencePiece BPE tokenizer, whose samples are encoded by sentencepiece itself."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=trained,
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    pieces = range(processor.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in pieces])
    writer.add_token_scores([processor.get_score(i) for i in pieces])
    kinds = gguf.TokenType
    writer.add_token_types(
        [
            kinds.UNKNOWN if processor.is_unknown(i)
            else kinds.CONTROL if processor.is_control(i)
            else kinds.BYTE if processor.is_byte(i)
            else kinds.NORMAL
            for i in pieces
        ]
    )  # fmt: skip
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    write_samples(
        GOLDEN / "gguf-llama.tokens.json",
        [[1, *processor.encode(text)] for text in SAMPLES],
        decoded=[processor.decode(processor.encode(text)) for text in SAMPLES],
    )


def write_byte_level(writer: gguf.GGUFWriter) -> None:
    """A byte-level BPE tokenizer; samples for every pre-tokenizer from the same tables."""
    backend = train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    saved = json.loads(backend.to_str())["model"]
    vocab, merges = saved["vocab"], [" ".join(merge) for merge in saved["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(sorted(vocab, key=vocab.get))
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(vocab) - 3))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        # Qwen's tokenizer composes characters first; the samples have one that is not.
        texts = [text.replace("e\u0301", "é") if pre == "qwen2" else text for text in SAMPLES]
        write_samples(
            GOLDEN / f"gguf-{pre}.tokens.json",
            [encode_with_special(text, SPECIAL, vocab, merges, pre) for text in texts],
        )
