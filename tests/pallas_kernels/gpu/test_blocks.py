import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import empty_pages
from pallas_kernels.attention.gpu import blocks
from pallas_kernels.gpu import HEAD_DIMS, PAGE_SIZES, TILE_ROWS


def choose(
    dim, page_size, batch=1, num_pages=256, capacity=None, window=4, heads=8, group=4, dtype="bfloat16"
):
    q = jax.ShapeDtypeStruct((batch, window, heads * group, dim), jnp.bfloat16)
    pages = jax.eval_shape(lambda: empty_pages((batch, heads, num_pages, 2, page_size, dim), dtype))
    chosen = []
    jax.eval_shape(lambda *args: chosen.append(blocks.choose_blocks(*args, capacity or num_pages)), q, pages)
    return chosen[0]


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Puts tuned entries in place of the ones that the library has."""

    def put(*entries):
        monkeypatch.setattr(blocks, "TUNED", tmp_path / "tuned.json")
        blocks.TUNED.write_text(json.dumps({"entries": entries}))
        blocks._entries.cache_clear()

    put()
    yield put
    monkeypatch.undo()
    blocks._entries.cache_clear()


@pytest.mark.parametrize(
    ("dim", "page_size", "dtype"),
    [
        *itertools.product(HEAD_DIMS, PAGE_SIZES, ["bfloat16"]),
        *itertools.product(HEAD_DIMS[:2], PAGE_SIZES, ["int8"]),
    ],
)
def test_the_rule_fits_every_supported_shape(tuned, dim, page_size, dtype):
    itemsize = jnp.dtype(dtype).itemsize
    for batch, num_pages in itertools.product((1, 3, 40), (1, 2, 3, 5, 64, 2048)):
        chosen = choose(dim, page_size, batch, num_pages, dtype=dtype)
        tokens = chosen.pages * page_size
        assert 1 <= chosen.pages <= max(num_pages, TILE_ROWS // page_size)
        assert itemsize * tokens % TILE_ROWS == 0
        assert chosen.stages % chosen.warpgroups == 0
        stages = chosen.stages * blocks.stage_bytes(chosen.pages, page_size, dim, itemsize)
        assert 0 < stages <= blocks.free_bytes(dim, tokens * chosen.warpgroups if itemsize == 1 else 0)
        assert 1 <= chosen.splits <= -(-num_pages // chosen.pages)


def test_splits_fill_the_chip_once(tuned):
    assert choose(128, 16, batch=1).splits == 132 // 8
    assert choose(128, 16, batch=8, num_pages=2048).splits == 132 // 64
    assert choose(128, 16, batch=40).splits == 1


def entry(rows, pages, stages, dim=128, waves=1):
    sizes = {"pages": 2, "stages": stages, "warpgroups": 2, "waves": waves}
    return {"chip": "H100", "head_dim": dim, "page_size": 16, "rows": rows, "pages": pages, "blocks": sizes}


def test_the_nearest_tuned_entry_is_taken(tuned):
    tuned(entry(16, 2048, 2), entry(16, 65536, 4, waves=2), entry(16, 2048, 6, dim=64))
    assert choose(128, 16, capacity=256) == blocks.Blocks(2, 2, 16)
    assert choose(128, 16, batch=8, num_pages=2048) == blocks.Blocks(2, 4, 4)
    assert choose(64, 16, capacity=256).stages == 6
    assert choose(128, 32, capacity=256).stages not in (2, 6)  # no entry: the rule


def test_a_given_cut_is_taken_instead_of_a_tuned_one(tuned):
    tuned(entry(16, 2048, 2))
    q, pages = jnp.zeros((1, 4, 32, 128), jnp.bfloat16), jnp.zeros((1, 8, 64, 2, 16, 128), jnp.bfloat16)
    assert blocks.choose_blocks(q, pages, 64, (8, 3, 1, 2)) == blocks.Blocks(8, 3, 8, warpgroups=1)
