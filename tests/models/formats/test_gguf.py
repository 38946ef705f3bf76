import math
from pathlib import Path

import gguf
import numpy as np
import pytest

from retro_jax import models
from retro_jax.models.formats.weights import separate_weights
from retro_jax.models.rope import rope_frequencies
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
        kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        kinds |= {float: writer.add_float32, list: writer.add_array}
        full = key if key.startswith(("split.", "general.", "tokenizer.")) else f"{architecture}.{key}"
        kinds[type(value)](full, value)
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
    weights = separate_weights(model.params, model.config)
    for layer, kind in enumerate(kinds):
        expected = gguf.quants.dequantize(random_blocks(kind), kind)
        assert np.abs(expected).max() > 0
        np.testing.assert_array_equal(weights[f"layers.{layer}.w_up"], expected.T, err_msg=kind.name)


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
        ({"expert_count": 8}, "8 experts, but no expert_used_count"),
        ({"expert_count": 8, "expert_used_count": 9}, "cannot go through 9 of 8 experts"),
        (
            {"expert_shared_count": 1, "expert_weights_scale": 2.5},
            r"expert_shared_count 1.*_scale 2\.5",
        ),
        ({"architecture": "qwen2", "expert_count": 8}, r"not supported: qwen2\.expert_count 8"),
        ({"rope.scaling.type": "dynamic"}, "rope scaling 'dynamic'; none, linear, yarn, longrope are"),
        (
            {"rope.scaling.type": "longrope"},
            "the tensors of no factors; longrope needs rope_factors_long.weight",
        ),
        ({"rope.dimension_count": 32}, r"rope\.dimension_count 32, only 64"),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, r"both rope\.scaling\.factor 2\.0 and"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor 0\.5"),
        ({"rope.scaling.yarn_ext_factor": 1.0}, r"with scaling 'linear' only 0\.0 is supported"),
        ({"rope.scaling.yarn_log_multiplier": 0.5}, r"not supported: llama\.rope\.scaling\.yarn_log_mult"),
        ({"rope.dimension_sections": [16, 24, 24, 0]}, r"rope\.dimension_sections \[16, 24, 24, 0\]"),
        (
            {"attention.causal": False, "attention.clamp_kqv": 8.0, "use_parallel_residual": True},
            r"llama\.attention\.causal False, llama\.attention\.clamp_kqv 8\.0, llama\.use_parallel_residual",
        ),
        ({"attention.layer_norm_epsilon": 1e-5}, r"attention\.layer_norm_epsilon"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping 30\.0"),
        ({"logit_scale": 0.5}, r"logit_scale 0\.5"),
        ({"feed_forward_length": [256, 512]}, r"feed_forward_length \[256, 512\]; only equal layers"),
        ({"vocab_size": 300}, r"300 tokens by llama\.vocab_size, but 256 rows of token_embd\.weight"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, r"2 tokens by tokenizer\.ggml\.tokens, but 256 rows"),
        ({"tensor_data_layout": "other"}, "tensor_data_layout 'other'"),
        ({"general.type": "adapter"}, "holds a adapter, not a model"),
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
    rope = models.Rope(10_000.0, models.RopeScaling("yarn", factor=4, original_positions=16))
    assert set(config.layers) == {models.LayerKind(rope, window=48)}
    assert (config.max_positions, config.norm_eps, config.tie_embeddings) == (64, 1e-5, True)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scale_linear": 4.0}, models.RopeScaling("linear", factor=4.0)),
        ({"rope.scaling.factor": 4.0}, models.RopeScaling("linear", factor=4.0)),
        ({"rope.scaling.attn_factor": 1.5}, models.RopeScaling("linear", attention_factor=1.5)),
        ({"rope.scaling.type": "yarn"}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
            models.RopeScaling("yarn", factor=2.0, original_positions=64),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 1.0 / 2**-2,
                "rope.scaling.yarn_beta_fast": 8.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.yarn_ext_factor": 1.0,
                "rope.scaling.attn_factor": 1.5,
                "rope.scaling.finetuned": True,
            },
            models.RopeScaling(
                "yarn",
                factor=4.0,
                original_positions=64,
                beta_fast=8.0,
                beta_slow=2.0,
                attention_factor=1.5 * (1 + 0.1 * math.log(4.0)),
            ),
        ),
    ],
)
def test_every_rope_key_counts(tmp_path, keys, scaling):
    """As llama.cpp: linear if no type is given, the old key if the new one is missing."""
    assert models.load_model(str(write_gguf(tmp_path / "m.gguf", **keys))).config.rope_scaling == scaling


def test_rope_factors_and_linear_scaling_multiply(tmp_path):
    tensors = layer_tensors() | {"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tensors=tensors, **{"rope.scaling.factor": 2.0})
    scaling = models.load_model(str(path)).config.rope_scaling
    np.testing.assert_allclose(scaling.factors, np.linspace(2, 16, 32), rtol=1e-6)


def test_a_stated_attention_factor_scales_every_kind():
    linear = models.RopeScaling("linear", attention_factor=1.5)
    assert rope_frequencies(models.Rope(scaling=linear), 8, 64)[1] == 1.5
    assert rope_frequencies(models.Rope(), 8, 64)[1] == 1.0


def test_keys_without_effect_and_unknown_keys(tmp_path, caplog):
    neutral = {
        "attention.causal": True, "use_parallel_residual": False, "logit_scale": 1.0, "expert_used_count": 0,
        "pooling_type": 3, "tensor_data_layout": "Meta AI original pth", "attention.clamp_kqv": 0.0,
    }  # fmt: skip
    models.load_model(str(write_gguf(tmp_path / "m.gguf", **neutral)))
    assert not caplog.records
    models.load_model(str(write_gguf(tmp_path / "n.gguf", **{"attention.wobble": 2.0})))
    assert "unknown metadata is ignored: llama.attention.wobble" in caplog.text


def write_parts(folder: Path, count: int = 2, total: int | None = None) -> list[Path]:
    """A model in two parts; the first lacks output.weight only."""
    whole = layer_tensors() | {"output.weight": np.ones((256, 256), np.float16)}
    halves = [{name: whole[name] for name in list(whole)[:-1]}, {"output.weight": whole["output.weight"]}]
    keys = {"split.count": count, "split.tensors.count": total or len(whole)}
    return [
        write_gguf(folder / f"m-0000{number + 1}-of-00002.gguf", tensors=half, **keys, **{"split.no": number})
        for number, half in enumerate(halves)
    ]


def test_all_parts_of_a_split_model_load_by_any(tmp_path):
    for part in write_parts(tmp_path):
        model = models.load_model(str(part))
        np.testing.assert_array_equal(model.params.head, np.ones((256, 256)))


def test_a_part_is_never_taken_for_the_whole(tmp_path):
    first, second = write_parts(tmp_path)
    renamed = first.rename(tmp_path / "whole.gguf")
    with pytest.raises(ValueError, match=r"is part 1 of 2; name the parts NAME-00001-of-00002\.gguf"):
        models.load_model(str(renamed))
    with pytest.raises(FileNotFoundError, match=r"one of 2 parts; m-00001-of-00002\.gguf are missing"):
        models.load_model(str(second))
    renamed.rename(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="is not part 2 of 2 by its metadata"):
        models.load_model(str(first))


def test_tensors_of_a_split_model_are_counted(tmp_path):
    with pytest.raises(ValueError, match="has 12 tensors, its metadata says 30"):
        models.load_model(str(write_parts(tmp_path, total=30)[0]))
