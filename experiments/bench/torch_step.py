"""A dense decode step in PyTorch, step by step on request; run by an interpreter that has torch.

`bench decode` starts `PYTHON torch_step.py SIZES`, a JSON object. A layer of a Llama-like model is compiled,
query, key and value are one product, gate and up another, attention is PyTorch's own over a contiguous cache
of `context` tokens, and on a GPU the whole step is one CUDA graph. Weights and cache are random. A line
{"version": ...} is written to stdout; each line {"steps": n} on stdin is then answered by
{"milliseconds": [...], "tokens": [[...]]}, one entry per step. Imports nothing of this project, so that any
Python that has torch can run it.
"""

import json
import sys
import time
from types import SimpleNamespace

import torch
from torch.nn import functional


def norm(x, weight):
    """Root-mean-square norm in float32."""
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return (x.float() * scale).to(x.dtype) * weight


def rotate(x, cos, sin):
    """Rotary embedding of split halves."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def layer(x, at, cos, sin, keys, values, weights, heads, kv_heads):
    """One layer for the newest token of each sequence, whose key and value it writes at position `at`."""
    attn_norm, wqkv, wo, mlp_norm, w_gate_up, w_down = weights
    batch, dim = x.shape[0], keys.shape[-1]
    joined = (
        functional.linear(norm(x, attn_norm), wqkv).view(batch, 1, heads + 2 * kv_heads, dim).transpose(1, 2)
    )
    q, k, v = joined.split([heads, kv_heads, kv_heads], 1)
    keys.index_copy_(2, at, rotate(k, cos, sin))
    values.index_copy_(2, at, v)
    o = functional.scaled_dot_product_attention(rotate(q, cos, sin), keys, values, enable_gqa=True)
    x = x + functional.linear(o.transpose(1, 2).reshape(batch, 1, heads * dim), wo)
    gate, up = functional.linear(norm(x, mlp_norm), w_gate_up).chunk(2, -1)
    return x + functional.linear(functional.silu(gate) * up, w_down)


def head(x, final_norm, weight):
    """The most likely tokens."""
    return functional.linear(norm(x, final_norm), weight).float().argmax(-1)


def main(sizes: SimpleNamespace) -> None:
    """Compiles the step, then takes as many as each line of stdin asks for."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(sizes.threads)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, sizes.dtype)
    B, M, D = sizes.batch, sizes.width, sizes.head_dim

    def matrix(rows, columns, scale=1.0):
        return torch.randn(rows, columns, device=device, dtype=dtype) * (scale * columns**-0.5)

    def weights():
        joined = (sizes.num_heads + 2 * sizes.num_kv_heads) * D
        attention = ones, matrix(joined, M), matrix(M, sizes.num_heads * D, 0.1)
        return *attention, ones, matrix(2 * sizes.hidden_width, M), matrix(M, sizes.hidden_width, 0.1)

    def cache():
        shape = B, sizes.num_kv_heads, sizes.context, D
        return [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]

    ones = torch.ones(M, device=device, dtype=dtype)
    embed = matrix(sizes.vocab_size, M)
    layers = [(cache(), weights()) for _ in range(sizes.num_layers)]
    tokens = torch.zeros(B, 1, dtype=torch.long, device=device)
    at = torch.tensor([sizes.context - 1], device=device)
    angles = at / 500_000.0 ** (torch.arange(D // 2, device=device) / (D // 2))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    one_layer, one_head = (torch.compile(part, fullgraph=True, dynamic=False) for part in (layer, head))

    def step():
        x = embed[tokens]
        for (keys, values), parts in layers:
            x = one_layer(x, at, cos, sin, keys, values, parts, sizes.num_heads, sizes.num_kv_heads)
        tokens.copy_(one_head(x, ones, embed))

    for _ in range(3):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    print(json.dumps({"version": f"torch {torch.__version__}"}), flush=True)
    for line in sys.stdin:
        milliseconds, chosen = [], []
        for _ in range(json.loads(line)["steps"]):
            start = time.perf_counter()
            step()
            values = tokens[:, 0].tolist()  # waits for the device
            milliseconds.append((time.perf_counter() - start) * 1e3)
            chosen.append(values)
        print(json.dumps({"milliseconds": milliseconds, "tokens": chosen}), flush=True)


if __name__ == "__main__":
    main(SimpleNamespace(**json.loads(sys.argv[1])))
