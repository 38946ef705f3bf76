"""The TPU kernel of the page update in the interpreter, against the reference."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import STATISTICS, empty_pages
from pallas_kernels.update.tpu import kernels as mosaic_tpu
from tests.pallas_kernels.equality import FUSED, assert_same_update
from tests.pallas_kernels.inputs import dtype_beside, random_update, shapes_of_statistics
from tests.pallas_kernels.tpu.interpreter import INTERPRET, races_found, run

pytestmark = pytest.mark.timeout(120)
PAGES = 16
KINDS = FUSED["mosaic_tpu"]
SIZES = itertools.cycle(  # tokens, page size, head_dim, KV heads, dtype
    [
        (4, 16, 64, 2, jnp.bfloat16),
        (1, 32, 128, 3, jnp.bfloat16),
        (18, 16, 256, 1, jnp.float32),
        (3, 64, 64, 2, jnp.bfloat16),
        (1, 128, 64, 9, jnp.float32),
        (20, 16, 128, 2, jnp.float32),
    ]
)


def assert_updates_as_the_reference_does(inputs, **options):
    assert_same_update(run(mosaic_tpu.update_pages, *inputs, **options), inputs)


@pytest.mark.parametrize(
    ("kind", "tokens", "page_size", "dim", "heads", "dtype"),
    [
        *((kind, *next(SIZES)) for kind in (*KINDS, KINDS[0], None, *KINDS)),
        ("min_max", 4, 64, 64, 1, jnp.int8),
        ("mean_key", 5, 16, 128, 2, jnp.float8_e4m3fn),
    ],
)
def test_update_equals_the_reference(kind, tokens, page_size, dim, heads, dtype):
    """Lengths across pages, shorter than the update, at the capacity, beyond; a sequence without a token."""
    rng = np.random.default_rng(tokens)
    end = PAGES * page_size
    lengths = [
        5 * page_size + 3,
        page_size,
        2,
        page_size + 1,
        end,
        end + 1,
        end + page_size + 40,
    ]
    inputs = random_update(rng, lengths, tokens, page_size, heads, dim, kind, dtype, PAGES)
    inputs[5] = inputs[5].at[3].set(False)
    assert_updates_as_the_reference_does(inputs)


@pytest.mark.parametrize(
    ("kind", "pages", "lengths", "dtype"),
    [
        ("mean_key_int8", 136, [128 * 16 + 3, 5], jnp.int8),  # scales of two pieces, the last one cut short
        ("mean_key_int8", 5, [5 * 16, 33], jnp.bfloat16),
        ("mean_key", 20, [17 * 16 + 1, 20 * 16], jnp.bfloat16),
    ],
)
def test_pages_that_are_no_whole_pieces(kind, pages, lengths, dtype):
    inputs = random_update(np.random.default_rng(pages), lengths, 8, 16, 2, 64, kind, dtype, pages)
    assert_updates_as_the_reference_does(inputs)


def test_8_bit_statistics_are_those_of_the_whole_page():
    """A past key that was a page's largest shrinks the scale; keys that are all zero have scale 0."""
    rng = np.random.default_rng(3)
    inputs = random_update(rng, [16 + 8, 8], 8, 16, 1, 64, "mean_key_int8", jnp.float32, PAGES)
    pages, _, k, *_ = inputs
    inputs[0] = pages.at[0, 0, 1, 0, 2].set(1e4)
    inputs[2] = k.at[1].set(0)
    result = run(mosaic_tpu.update_pages, *inputs)
    assert 0 < result[1].scales[0, 0, 1, 0] < 1
    assert result[1].scales[1, 0, 0, 0] == 0
    assert_same_update(result, inputs)


def test_only_the_tokens_to_write_are_written():
    rng = np.random.default_rng(0)
    inputs = random_update(rng, [40, 33], 4, 16, 2, 64, "min_max", jnp.bfloat16, PAGES)
    inputs[5] = jnp.asarray([[False, True, False, True], [False, False, False, True]])
    assert_updates_as_the_reference_does(inputs)


def test_several_steps_of_the_grid_on_two_cores(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_sequences_per_step", lambda batch, *_: 2)
    two = dataclasses.replace(INTERPRET, num_cores_or_threads=2)
    rng = np.random.default_rng(1)
    inputs = random_update(rng, [40, 33, 1, 16, 17, 50], 3, 16, 1, 64, "mean_key", jnp.bfloat16, PAGES)
    assert_updates_as_the_reference_does(inputs, interpret=two)


def test_the_interpreter_finds_a_copy_that_nobody_waits_for(monkeypatch):
    class Unawaited:
        def __init__(self, *args):
            self.copy = copy(*args)

        def start(self):
            self.copy.start()

        def wait(self):
            pass

    copy = pltpu.make_async_copy
    monkeypatch.setattr(mosaic_tpu.pltpu, "make_async_copy", Unawaited)
    inputs = random_update(np.random.default_rng(0), [47], 5, 16, 3, 64, "min_max", jnp.bfloat16, PAGES)
    eager = dataclasses.replace(INTERPRET, dma_execution_mode="eager")
    _, races = races_found(mosaic_tpu.update_pages.__wrapped__, *inputs, interpret=eager)
    assert races


def test_update_refuses_what_it_does_not_support(monkeypatch):
    two = dataclasses.replace(STATISTICS["min_max"], name="two_int8", quantized=True)
    monkeypatch.setitem(STATISTICS, "two_int8", two)
    assert not two.fused_by("mosaic_tpu") and two.fused_by("mosaic_gpu")

    def update(tokens=1, pages=16, heads=1, page_size=16, dim=64, kind="min_max", dtype="bfloat16"):
        beside = dtype_beside(dtype)
        return jax.eval_shape(
            mosaic_tpu.update_pages,
            jax.eval_shape(lambda: empty_pages((1, heads, pages, 2, page_size, dim), jnp.dtype(dtype))),
            shapes_of_statistics(kind, (1, heads, pages), dim, beside),
            *[jax.ShapeDtypeStruct((1, tokens, heads, dim), beside)] * 2,
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((1, tokens), jnp.bool_),
        )

    for message, arguments in [
        ("dtype float16 has no Mosaic TPU kernel", {"dtype": jnp.float16}),
        ("head_dim 96 has no Mosaic TPU kernel", {"dim": 96}),
        ("page_size_in_8_bits 128 has no Mosaic TPU kernel", {"dtype": jnp.int8, "page_size": 128}),
        (r"vectors_in_8_bits 2 has no Mosaic TPU kernel \(1\)", {"kind": "two_int8"}),
        (
            r"needs \d+ bytes of VMEM, and a v5e has \d+",
            {"heads": 128, "page_size": 128, "dim": 256, "tokens": 2, "dtype": jnp.float32},
        ),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            update(**arguments)
