"""Greedy decoding by Hugging Face transformers, step by step on request; run by an interpreter that has it.

`bench_decode` starts `PYTHON transformers_reference.py FOLDER IDS.npy THREADS DTYPE`. After the prefill a
line {"version": ...} is written to stdout; each line {"steps": n} on stdin is then answered by
{"milliseconds": [...], "tokens": [[...]]}, one entry per step. Imports nothing of this project, so that any
Python that runs transformers can run it.
"""

import json
import sys
import time

import numpy as np
import torch
import transformers


def main(folder: str, ids_file: str, threads: int, dtype: str) -> None:
    """Prefills, then decodes as many steps as each line of stdin asks for."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    model.eval()
    ids = torch.from_numpy(np.load(ids_file).astype(np.int64)).to(device)
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        print(
            json.dumps({"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}),
            flush=True,
        )
        for line in sys.stdin:
            milliseconds, tokens = [], []
            for _ in range(json.loads(line)["steps"]):
                start = time.perf_counter()
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                values = token[:, 0].tolist()  # waits for the device
                milliseconds.append((time.perf_counter() - start) * 1e3)
                tokens.append(values)
            print(json.dumps({"milliseconds": milliseconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
