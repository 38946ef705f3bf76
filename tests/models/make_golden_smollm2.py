"""Makes golden/smollm2.npz and its token samples: Hugging Face transformers on SmolLM2's dequantised weights.

Run from the repository root as `python -m tests.models.make_golden_smollm2 FILE.gguf`, with the file of the
preset. Made with torch 2.13, transformers 5.23 and gguf 0.19, float32, eager attention.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.make_golden import GOLDEN, MESSAGES, SAMPLES, TEXT, write_samples
from tests.models.reference_bpe import encode, encode_with_special

PROMPT, STEPS, LOGIT_STRIDE = 704, 64, 4


def main(path: Path) -> None:
    metadata = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    merges = metadata["tokenizer.ggml.merges"]
    ids = [encode_with_special(text, special, vocab, merges, "smollm") for text in SAMPLES]
    transformers_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    chat = transformers_tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True,
        chat_template=metadata["tokenizer.chat_template"],
    )  # fmt: skip
    write_samples(GOLDEN / "smollm2.tokens.json", ids, chat=chat)

    text_ids = encode(TEXT, vocab, merges, "smollm")[: PROMPT + STEPS]
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    batch = torch.tensor([text_ids])
    with torch.no_grad():
        prefill = model(batch[:, :PROMPT], use_cache=True)
        rows, cache = [prefill.logits[0]], prefill.past_key_values
        for step in range(PROMPT, PROMPT + STEPS):
            output = model(batch[:, step : step + 1], past_key_values=cache, use_cache=True)
            rows.append(output.logits[0])
            cache = output.past_key_values
    logits = torch.cat(rows)
    positions = np.r_[0:PROMPT:LOGIT_STRIDE, PROMPT : PROMPT + STEPS]
    vocab_ids = np.sort(np.random.default_rng(0).choice(len(tokens), 256, replace=False))
    np.savez_compressed(
        GOLDEN / "smollm2.npz",
        tokens=np.array(text_ids, np.int32),
        prompt_tokens=PROMPT,
        positions=positions,
        vocab_ids=vocab_ids,
        logits=logits[positions][:, vocab_ids].numpy(),
        argmax=logits.argmax(-1).numpy().astype(np.int32),
        logsumexp=logits.double().logsumexp(-1).numpy(),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
