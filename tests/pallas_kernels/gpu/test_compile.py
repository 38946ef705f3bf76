"""Every kernel and supported shape through the real CUDA compiler for an H100, on a machine without a GPU.

Needs the packages of cuda-compiler.txt on the path, which `make test` puts there.
"""

import dataclasses
import functools
import itertools
import math
import re
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import constraints
from jax.sharding import SingleDeviceSharding

from pallas_kernels import empty_pages
from pallas_kernels.attention.gpu import kernels as attention
from pallas_kernels.experts.gpu import kernels as experts
from pallas_kernels.gpu import DTYPES, HEAD_DIMS, PAGE_SIZES
from pallas_kernels.selection.gpu import kernels as selection
from pallas_kernels.sums.gpu import kernels as sums
from pallas_kernels.sums.gpu import parts
from pallas_kernels.update.gpu import kernels as update
from retro_jax import DecodeConfig, decode_step, init_state, models, preset, verified_decode
from retro_jax.experiments.machine.programs import not_cached
from tests.pallas_kernels.inputs import bounded, dtype_beside, shapes_of_statistics, silu
from tests.retro_jax.tiny import tiny

pytestmark = [
    pytest.mark.skipif(
        find_spec("jax_cuda13_plugin") is None, reason="needs the packages of cuda-compiler.txt: make test"
    ),
    pytest.mark.timeout(240),
]
H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
B, K, TOKENS = 2, 8, 32768


@pytest.fixture(scope="module")
def sharding():
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return SingleDeviceSharding(topology.devices[0])


@pytest.fixture
def compiled(sharding, tmp_path, monkeypatch):
    """Compiles a function of shapes for an H100: what it became, and {kernel: (PTX, assembler's report)}."""

    def compile_for_h100(function, *shapes, donate=()):
        monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
        # The search for layouts would be written there too, which takes longer than all else together.
        monkeypatch.setattr(constraints.ConstraintSystem, "__str__", lambda _: "")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        with not_cached():
            executable = jax.jit(function, donate_argnums=donate).lower(*shapes).compile()
        kernels = {}
        for report in tmp_path.glob("*.ptxas"):
            name = re.sub(r"_\d+$", "", report.stem)
            kernels[name] = report.with_suffix(".ptx").read_text(), report.read_text()
        return executable, kernels

    return compile_for_h100


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes_of_pages(*sizes, dtype):
    return jax.eval_shape(lambda: empty_pages(sizes, jnp.dtype(dtype)))


def assert_no_spills(kernels, *names):
    assert sorted(kernels) == sorted(names)
    for name, (_, report) in kernels.items():
        assert "for 'sm_90a'" in report
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), (name, report)


def assert_tma_and_wgmma(ptx):
    assert "cp.async.bulk.tensor" in ptx
    assert "wgmma.mma_async" in ptx


@pytest.mark.parametrize(("width", "senders", "splits", "norm"), [(4096, 2, 1, True), (8192, 8, 8, False)])
def test_sums_over_devices(compiled, width, senders, splits, norm):
    """Of one device of several, whose cells are changed in place."""

    def two(x, parts, norm):
        cells, address = sums.open_cells(4, width, x.dtype, senders)
        cells, addresses = jax.new_ref(cells), jnp.tile(address, (senders, 1))
        for turn in range(2):
            sender = jnp.zeros(1, jnp.int32)
            x, _ = sums.add_sum(x, parts, norm, cells, addresses, sender, eps=1e-5, turn=turn)
            x = x[0]
        return x

    weight, of = shape(width) if norm else None, jnp.float32 if splits > 1 else jnp.bfloat16
    executable, kernels = compiled(two, shape(4, width), shape(1, splits, 4, width, dtype=of), weight)
    assert_no_spills(kernels, "open_cells", "add_sum")
    lines = [line for line in executable.as_text().splitlines() if "output_to_operand_aliasing" in line]
    assert sum("add_sum" in line for line in lines) == 2
    ptx = kernels["add_sum"][0]
    assert ptx.count("ld.relaxed.sys") == senders * width // 1024
    assert "bra again" in ptx


@pytest.mark.parametrize(
    ("width", "norms", "dtype", "weights"),
    [(8192, 2, jnp.bfloat16, jnp.float32), (2880, 1, jnp.float16, jnp.float16)],
)
def test_sums_of_parts(compiled, width, norms, dtype, weights):
    weights = [None] * (2 - norms) + [shape(width, dtype=weights)] * norms
    add = functools.partial(parts.add_parts, eps=1e-5, multiplier=0.5)
    arrays = shape(2, 1, width, dtype=dtype), shape(8, 2, 1, width, dtype=jnp.float32)
    _, kernels = compiled(add, *arrays, *weights)
    assert_no_spills(kernels, "add_parts")
    # The even piece of a row is read in words of four numbers.
    assert kernels["add_parts"][0].count("ld.global.v4") >= 8 * (width // 512)


ROWS = itertools.cycle([(4, 4), (1, 1), (16, 4), (2, 8), (3, 5)])  # (window, group)
CASES = [
    (dim, page_size, *next(ROWS), dtype)
    for dim, page_size, dtype in [
        *((dim, page_size, jnp.bfloat16) for dim, page_size in itertools.product(HEAD_DIMS, PAGE_SIZES)),
        (128, 16, jnp.float16),
        (128, 16, jnp.int8),
        (64, 8, jnp.float8_e4m3fn),
    ]
]


@pytest.mark.parametrize(
    ("rows", "width", "hidden", "count", "per_token", "biased"),
    [(1, 2048, 768, 128, 8, False), (64, 2880, 2880, 32, 4, True)],
)
def test_mixture_of_experts(compiled, rows, width, hidden, count, per_token, biased):
    """Qwen3-30B-A3B for one token, gpt-oss-20b for many."""
    weights = shape(width, count), shape(count, width, 2 * hidden), shape(count, hidden, width)
    biases = shape(count), shape(count, 2 * hidden), shape(count, width)
    _, kernels = compiled(
        functools.partial(
            experts.mixture_of_experts,
            per_token=per_token,
            normalized=True,
            parts=1,
            activation=bounded if biased else silu,
        ),
        shape(rows, width),
        *weights,
        *(biases if biased else [None] * 3),
        shape(rows, dtype=jnp.bool_),
    )
    assert_no_spills(kernels, "choose_experts", "apply_experts")
    assert_tma_and_wgmma(kernels["apply_experts"][0])


@pytest.mark.parametrize(("dim", "page_size", "window", "group", "dtype"), CASES)
def test_attention(compiled, dim, page_size, window, group, dtype):
    P, N = TOKENS // page_size, K * group
    pages = shapes_of_pages(B, K, P, 2, page_size, dim, dtype=dtype)
    assert dtype_beside(dtype) in DTYPES
    executable, kernels = compiled(
        functools.partial(attention.attend_window, dtype=dtype_beside(dtype)),
        shape(B, window, N, dim, dtype=dtype_beside(dtype)),
        pages,
        shape(B, K, P // 8, dtype=jnp.int32),
        shape(B, K, dtype=jnp.int32),
        shape(B, K, P, dtype=jnp.int32),
        shape(B, window, dtype=jnp.int32),
        shape(B, window - 1, N, dim, dtype=jnp.float32),
        shape(B, window - 1, N, dtype=jnp.float32),
        shape(B, dtype=jnp.bool_),
        donate=(4, 6, 7),
    )
    assert_no_spills(kernels, "retro_attention", "merge")
    ptx = kernels["retro_attention"][0]
    assert_tma_and_wgmma(ptx)
    # Scales, whose 64 bytes of a page of 8 tokens are no tile.
    assert ("cp.async.bulk.shared::cta.global" in ptx) == (jnp.dtype(dtype).itemsize == 1)
    in_place = B * K * P + B * (window - 1) * N * (dim + 1)  # last_loaded and the output cache
    assert executable.memory_analysis().alias_size_in_bytes == in_place * 4
    assert not re.search(r" copy\(%(last_loaded|cached)", executable.as_text())


@pytest.mark.parametrize(
    ("dim", "page_size", "dtype"),
    [*((dim, 16, jnp.bfloat16) for dim in HEAD_DIMS), (128, 8, jnp.float8_e4m3fn)],
)
def test_dense_attention(compiled, dim, page_size, dtype):
    q, positions = shape(B, 1, 4 * K, dim), shape(B, 1, dtype=jnp.int32)
    pages = shapes_of_pages(B, K, TOKENS // page_size, 2, page_size, dim, dtype=dtype)
    _, kernels = compiled(attention.dense_attention, q, pages, positions)
    assert_no_spills(kernels, "dense_attention", "merge")
    assert_tma_and_wgmma(kernels["dense_attention"][0])


@pytest.mark.parametrize(
    ("dim", "heads", "slots", "ring", "dtype"),
    [(128, 32, 4, 1027, jnp.int8), (256, 4, 4, 515, jnp.bfloat16)],
)
def test_window_attention(compiled, dim, heads, slots, ring, dtype):
    """Of Gemma 3 27B and of the smallest, for a window of 4."""
    group = {128: 2, 256: 4}[dim]
    pages = shapes_of_pages(B, heads // group, -(-ring // 128) * 8, 2, 16, dim, dtype=dtype)
    function = functools.partial(attention.window_attention, window=ring - slots + 1, ring=ring)
    _, kernels = compiled(function, shape(B, slots, heads, dim), pages, shape(B, slots, dtype=jnp.int32))
    assert_no_spills(kernels, "window_attention", "merge")
    assert_tma_and_wgmma(kernels["window_attention"][0])


@pytest.mark.parametrize(
    ("dim", "pages", "score", "kind", "group_reduce", "group"),
    [
        (64, 2048, "bounds", "min_max", "max", 1),
        (128, 8192, "bounds", "min_max", "mean", 4),
        (256, 680, "mean_key", "mean_key", "mean", 9),
        (256, 2048, "bounds", "min_max", "max", 16),
        (16, 2048, "mean_key", "mean_key_int8", "mass", 3),
        (32, 4096, "mean_key", "mean_key_int8", "mass", 4),
        (64, 40, "mean_key", "mean_key_int8", "mass", 16),
        (128, 8192, "mean_key", "mean_key_int8", "mass", 4),
        (256, 680, "mean_key", "mean_key_int8", "max", 9),
    ],
)
def test_selection(compiled, dim, pages, score, kind, group_reduce, group):
    function = functools.partial(
        selection.select_pages,
        page_size=16,
        capacity=pages // 8,
        score=score,
        group_reduce=group_reduce,
        sink_pages=1,
    )
    statistics = shapes_of_statistics(kind, (B, K, pages), dim)
    scalars = shape(B, dtype=jnp.int32)
    _, kernels = compiled(function, shape(B, K * group, dim), statistics, scalars, scalars)
    assert_no_spills(kernels, "score_pages", "choose_pages")
    assert_tma_and_wgmma(kernels["score_pages"][0])


@pytest.mark.parametrize(
    ("dim", "page_size", "tokens", "kind", "dtype"),
    [
        (64, 16, 1, "mean_key_int8", jnp.bfloat16),
        (128, 32, 4, "mean_key", jnp.bfloat16),
        (256, 16, 16, "min_max", jnp.bfloat16),
        (128, 16, 4, "mean_key_int8", jnp.int8),
        (256, 8, 3, "min_max", jnp.float8_e4m3fn),
    ],
)
def test_update(compiled, dim, page_size, tokens, kind, dtype):
    pages = shapes_of_pages(B, K, 256, 2, page_size, dim, dtype=dtype)
    statistics = shapes_of_statistics(kind, (B, K, 256), dim)
    k = v = shape(B, tokens, K, dim)
    write = shape(B, tokens, dtype=jnp.bool_)
    executable, kernels = compiled(
        update.update_pages,
        pages,
        statistics,
        k,
        v,
        shape(B, dtype=jnp.int32),
        write,
        donate=(0, 1),
    )
    assert_no_spills(kernels, "update_pages")
    memory = executable.memory_analysis()
    state = jax.tree.leaves((pages, statistics))
    assert memory.alias_size_in_bytes == sum(array.size * array.dtype.itemsize for array in state)
    assert memory.temp_size_in_bytes < math.prod(pages.shape) // 8


@pytest.mark.parametrize(
    ("dim", "page_size", "tokens", "kind", "dtype", "made"),
    [
        (128, 16, 2, "min_max", jnp.bfloat16, ("rope",)),
        (128, 8, 1, "mean_key_int8", jnp.int8, ("rope", "norms")),
        (64, 32, 1, None, jnp.bfloat16, ("rope", "bias", "scale")),
        (256, 16, 1, "min_max", jnp.bfloat16, ("rope", "norms", "scale")),
    ],
)
def test_update_from_a_product(compiled, dim, page_size, tokens, kind, dtype, made):
    pages = shapes_of_pages(B, K, 256, 2, page_size, dim, dtype=dtype)
    statistics = kind and shapes_of_statistics(kind, (B, K, 256), dim)
    norm = shape(dim) if "norms" in made else None
    angles = shape(B, tokens, dim // 2, dtype=jnp.float32) if "rope" in made else None
    executable, kernels = compiled(
        functools.partial(
            update.update_from_product,
            part_heads=2,
            norm_eps=1e-6,
            q_scale=2.0 if "scale" in made else 1.0,
            dtype=jnp.bfloat16,
        ),
        pages,
        statistics,
        shape(8, B, tokens, 6 * K * dim, dtype=jnp.float32),
        shape(6 * K * dim) if "bias" in made else None,
        norm,
        norm,
        angles,
        angles,
        shape(B, dtype=jnp.int32),
        shape(B, tokens, dtype=jnp.bool_),
        donate=(0, 1),
    )
    assert_no_spills(kernels, "update_pages")
    state = jax.tree.leaves((pages, statistics))
    in_place = sum(array.size * array.dtype.itemsize for array in state)
    assert executable.memory_analysis().alias_size_in_bytes == in_place
    assert executable.memory_analysis().temp_size_in_bytes == 0  # nothing is made before it


def test_a_decode_step_runs_through_the_kernels_and_copies_no_cache(compiled, monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch.kernels_of_device", lambda: "mosaic_gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = dataclasses.replace(
        tiny(group=3, layers=2).config, head_dim=64, dtype="bfloat16", max_positions=4096
    )
    config = DecodeConfig(window=4, budget_tokens=128, dense_layers=1)
    state = jax.eval_shape(lambda: init_state(model, config, B, 4096))
    params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))

    def step(params, state, tokens):
        return decode_step(params, model, config, state, tokens)

    executable, kernels = compiled(step, params, state, shape(B, dtype=jnp.int32), donate=1)
    assert {"retro_attention", "dense_attention", "score_pages", "choose_pages", "update_pages"} <= set(
        kernels
    )
    pages = state.layers[0].pages
    assert executable.memory_analysis().temp_size_in_bytes < pages.size * pages.dtype.itemsize


def test_nothing_but_kernels_touches_the_pages_of_the_recommended_preset(compiled, monkeypatch):
    """Nor their statistics, nor when they were loaded: each is an argument of kernels, and else passed on."""
    for module in ("dispatch", "update.api"):
        monkeypatch.setattr(f"pallas_kernels.{module}.kernels_of_device", lambda: "mosaic_gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = dataclasses.replace(
        tiny(group=3, layers=1).config, head_dim=64, dtype="bfloat16", max_positions=4096
    )
    config = preset("mean-key", budget_tokens=128, dense_layers=0, implementation="mosaic_gpu")
    state = jax.eval_shape(lambda: init_state(model, config, B, 4096))
    params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))

    def step(params, state, tokens):
        return decode_step(params, model, config, state, tokens)

    executable, kernels = compiled(step, params, state, shape(B, dtype=jnp.int32), donate=1)
    pages = {"retro_attention", "merge", "score_pages", "choose_pages", "update_pages"}
    assert set(kernels) == pages | {"add_parts"}
    (layer,) = state.layers
    for array in jax.tree.leaves((layer.pages, layer.statistics, layer.last_loaded)):
        dtype = {"bfloat16": "bf16", "int8": "s8", "int32": "s32", "float32": "f32"}[array.dtype.name]
        sizes = re.escape(f"{dtype}[{','.join(map(str, array.shape))}]")
        made = set(re.findall(rf"^ *(?:ROOT )?%\S+ = .*{sizes}\S* (\S+?)\(", executable.as_text(), re.M))
        assert "parameter" in made
        assert made <= {"parameter", "custom-call", "get-tuple-element", "bitcast", "tuple"}


def test_drafts_and_checks_run_through_the_kernels_and_copy_no_cache(compiled, monkeypatch):
    """A check of 9 tokens and 7 query heads fills all rows but one of a tile."""
    monkeypatch.setattr("pallas_kernels.dispatch.kernels_of_device", lambda: "mosaic_gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = dataclasses.replace(
        tiny(group=7, layers=1).config, head_dim=64, dtype="bfloat16", max_positions=4096
    )
    config = DecodeConfig("quest", budget_tokens=128, dense_layers=0, implementation="mosaic_gpu")
    state = jax.eval_shape(lambda: init_state(model, config, B, 4096))
    params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))

    def rounds(params, state, tokens):
        return verified_decode(params, model, config, state, tokens, 2, 8)

    executable, kernels = compiled(rounds, params, state, shape(B, dtype=jnp.int32), donate=1)
    dense = kernels["dense_attention"]
    assert_no_spills({"dense_attention": dense}, "dense_attention")
    assert {"retro_attention", "score_pages", "choose_pages", "update_pages"} <= set(kernels)
    pages = state.layers[0].pages
    assert executable.memory_analysis().temp_size_in_bytes < pages.size * pages.dtype.itemsize
