from pathlib import Path

import gguf
import numpy as np
import pytest

import models
from tests.models import golden

GGUF = golden.FOLDER / "gguf-qwen2.gguf"


def test_no_such_gguf(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no GGUF file"):
        models.load_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.6, 0.99])
def test_truncated_gguf(tmp_path, share):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF.read_bytes()[: int(GGUF.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"model\.gguf is truncated or not a GGUF file .*again"):
        models.load_model(str(path))


def test_not_a_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(ValueError, match="truncated or not a GGUF file"):
        models.load_model(str(path))


def write_gguf(path: Path, architecture: str = "llama", tensors: dict | None = None, **keys) -> Path:
    """A GGUF file from numpy arrays, or (bytes, kind) pairs, and metadata under the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 256, "feed_forward_length": 256}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 4}
    for key, value in (sizes | keys).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, tensor in (layer_tensors() if tensors is None else tensors).items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def layer_tensors(layers: int = 1) -> dict:
    matrix, vector = np.zeros((256, 256), np.float16), np.ones(256, np.float32)
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = {"token_embd.weight": matrix, "output_norm.weight": vector}
    for layer in range(layers):
        tensors |= {f"blk.{layer}.{name}.weight": matrix for name in names}
        tensors |= {f"blk.{layer}.{name}.weight": vector for name in ("attn_norm", "ffn_norm")}
    return tensors


def random_blocks(kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Bytes of a quantised (256, 256) matrix whose numbers are finite."""
    shape = gguf.quants.quant_shape_to_byte_shape((256, 256), kind)
    # No byte above 0x3f in any float16 or bfloat16 scale: neither inf nor NaN.
    return np.random.default_rng(0).integers(0, 0x40, shape, dtype=np.uint8)


def can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    if kind.name in ("F32", "F16"):
        return False
    try:
        gguf.quants.dequantize(random_blocks(kind), kind)
    except NotImplementedError:
        return False
    return True


def test_every_quantisation_loads(tmp_path):
    kinds = [kind for kind in gguf.GGMLQuantizationType if can_dequantize(kind)]
    assert len(kinds) >= 20
    tensors = layer_tensors(len(kinds))
    for layer, kind in enumerate(kinds):
        tensors[f"blk.{layer}.ffn_up.weight"] = (random_blocks(kind), kind)
    model = models.load_model(str(write_gguf(tmp_path / "m.gguf", tensors=tensors, block_count=len(kinds))))
    for layer, kind in zip(model.params.layers, kinds, strict=True):
        expected = gguf.quants.dequantize(random_blocks(kind), kind)
        assert np.abs(expected).max() > 0
        np.testing.assert_array_equal(layer.w_up, expected.T, err_msg=kind.name)


def test_unsupported_quantisations_and_mismatches_are_named_together(tmp_path):
    tensors = layer_tensors()
    tensors["blk.0.ffn_up.weight"] = np.ones((256, 256), np.int8)
    tensors["blk.0.ffn_down.weight"] = np.zeros((256, 128), np.float32)
    del tensors["output_norm.weight"]
    with pytest.raises(ValueError, match="3 problems") as error:
        models.load_model(str(write_gguf(tmp_path / "m.gguf", tensors=tensors)))
    for problem in (
        "unsupported quantisation: blk.0.ffn_up.weight is I8",
        "missing: output_norm.weight (256,)",
        "wrong shape: blk.0.ffn_down.weight is (256, 128), the configuration needs (256, 256)",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'; supported are llama, qwen2, qwen3"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope.scaling.type": "longrope"}, "rope scaling 'longrope'; none, linear, yarn are supported"),
        ({"rope.dimension_count": 32}, r"rope\.dimension_count 32, only 64"),
        ({"rope.scaling.type": "linear"}, r"no metadata key llama\.rope\.scaling\.factor"),
        ({"tensors": {}}, r"no tensor token_embd\.weight"),
    ],
)
def test_unsupported_gguf(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        models.load_model(str(write_gguf(tmp_path / "model.gguf", **keys)))


def test_gguf_yarn_and_window(tmp_path):
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4, "rope.scaling.original_context_length": 16}
    path = write_gguf(tmp_path / "model.gguf", **yarn, **{"attention.sliding_window": 48})
    config = models.load_model(str(path)).config
    assert config.rope_scaling == models.RopeScaling("yarn", factor=4, original_positions=16)
    assert (config.max_positions, config.norm_eps, config.tie_embeddings) == (48, 1e-5, True)
