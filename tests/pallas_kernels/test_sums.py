"""Sums that go to the residual stream: their definitions on CPU devices, and where kernels take over."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import retro_jax as rj
from pallas_kernels import Mailbox, add_parts, add_sum, depth_splits, open_mailbox
from pallas_kernels.dispatch import HEADS
from pallas_kernels.sums import api, reference
from pallas_kernels.sums.gpu import kernels, parts, peers
from retro_jax.models.transformer import rms_norm
from tests.pallas_kernels.equality import assert_close
from tests.pallas_kernels.gpu.test_kernels import run
from tests.pallas_kernels.inputs import random_parts

EPS = 1e-5


@pytest.mark.parametrize(("post_norm", "norm"), [*itertools.product((False, True), repeat=2)])
def test_parts_are_summed_normed_multiplied_added_and_normed(post_norm, norm):
    arguments = random_parts(np.random.default_rng(0), 2, 3, 8, 4, post_norm, norm, jnp.float32)
    x, branch, *weights = arguments
    total, normed = add_parts(*arguments, eps=EPS, multiplier=0.5)
    branch = branch.sum(0)
    branch = rms_norm(branch, weights[0], EPS) if post_norm else branch
    np.testing.assert_allclose(total, x + 0.5 * branch, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normed, rms_norm(total, weights[1], EPS) if norm else total, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "multiplier", "dtype"),
    (
        ((1, 1, 512, 8, False, True), 1.0, jnp.bfloat16),
        ((2, 2, 576, 1, True, True), 0.22, jnp.float16),
        ((1, 2, 48, 3, True, False), 1.0, jnp.bfloat16),
    ),
)
def test_the_kernel_for_parts_equals_its_definition(sizes, multiplier, dtype):
    """A row that comes twice, every way to cut rows, and each norm."""
    arguments = random_parts(np.random.default_rng(0), *sizes, dtype)
    options = {"eps": EPS, "multiplier": multiplier}
    got = run(parts.add_parts, *arguments, **options)
    expected = jax.jit(functools.partial(reference.add_parts, **options))(*arguments)
    for each, wanted in zip(got, expected, strict=True):
        assert each.dtype == wanted.dtype == dtype
        assert_close(each, wanted, float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("width", "dtype", "says"),
    (
        (64, jnp.float32, "dtype float32 has no Mosaic GPU kernel"),
        (8200, jnp.bfloat16, r"8200 columns have no Mosaic GPU kernel \(multiples of 16 up to 8192\)"),
        (40, jnp.bfloat16, "40 columns"),
    ),
)
def test_the_kernel_for_parts_refuses_in_words(width, dtype, says):
    arguments = random_parts(np.random.default_rng(0), 1, 1, width, 1, False, True, dtype)
    with pytest.raises(NotImplementedError, match=says):
        parts.add_parts(*arguments, eps=EPS, multiplier=1.0)


@pytest.mark.parametrize("shape", [(2, 3, 4, 16), (0, 3, 5, 16)])
def test_parts_of_another_stream_are_refused(shape):
    x, parts = jnp.zeros((3, 5, 16)), jnp.zeros(shape)
    with pytest.raises(ValueError, match=r"parts of shape .* of shape \(3, 5, 16\) takes"):
        add_parts(x, parts, None, None, eps=1e-5)
    with pytest.raises(ValueError, match=r"parts of shape .* of shape \(5, 16\) takes"):
        add_sum(x[0], parts[:, 0], None, None, eps=1e-5, turn=0)


@pytest.mark.parametrize(
    ("sizes", "kernels", "mesh", "splits"),
    (
        ((64, 4096, "bfloat16"), "mosaic_gpu", (1, 1), 8),
        ((65, 4096, "bfloat16"), "mosaic_gpu", (1, 1), 1),
        ((4, 4096 + 32, "bfloat16"), "mosaic_gpu", (1, 1), 1),
        ((4, 4096, "float32"), "mosaic_gpu", (1, 1), 1),
        ((4, 4096, "bfloat16", "xla"), "mosaic_gpu", (1, 1), 1),
        ((4, 4096, "bfloat16"), "mosaic_tpu", (1, 1), 1),
        ((4, 4096, "bfloat16"), "mosaic_gpu", (1, 2), 1),
    ),
)
def test_the_depth_of_few_rows_is_cut_where_a_kernel_adds_the_parts_up(
    monkeypatch, sizes, kernels, mesh, splits
):
    monkeypatch.setattr(api, "kernels_of_device", lambda: kernels)
    with jax.set_mesh(rj.make_mesh(*mesh)):
        assert depth_splits(*sizes) == splits


def test_parts_are_left_to_xla_on_a_tpu(monkeypatch):
    monkeypatch.setattr(api, "kernels_of_device", lambda: "mosaic_tpu")
    arguments = random_parts(np.random.default_rng(0), 1, 1, 8, 1, False, True, jnp.float32)
    found, named = (add_parts(*arguments, eps=EPS, implementation=by) for by in (None, "mosaic_tpu"))
    np.testing.assert_array_equal(found, named)


@pytest.mark.parametrize("norm", (True, False))
def test_the_definition_adds_all_parts_and_norms(norm):
    rng = np.random.default_rng(0)
    x, parts, weight = (jnp.asarray(rng.normal(size=size), "float32") for size in ((3, 8), (4, 5, 8), 8))
    parts = parts.at[:, 3:].set(jnp.nan)  # rows that are none of the stream's

    def local(x, own):  # two of the parts
        return add_sum(x, own, weight if norm else None, None, eps=EPS, turn=0)

    with jax.set_mesh(rj.make_mesh(1, 2)):
        spread = jax.shard_map(local, in_specs=(P(), P(HEADS)), out_specs=P(), check_vma=False)
        total, normed = jax.jit(spread)(x, parts)
    np.testing.assert_allclose(total, x + parts[:, :3].sum(0), rtol=1e-6)
    np.testing.assert_allclose(normed, rms_norm(total, weight, EPS) if norm else total, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "senders", "taken"),
    (
        (4, 4096, "bfloat16", 2, True),
        (128, 8192, "float16", 8, True),
        (129, 4096, "bfloat16", 2, False),
        (4, 16384, "bfloat16", 2, False),
        (4, 4096 + 512, "bfloat16", 2, False),
        (4, 4096, "float32", 2, False),
        (4, 4096, "bfloat16", 16, False),
    ),
)
def test_the_kernel_says_what_it_takes(rows, width, dtype, senders, taken):
    assert kernels.supported(rows, width, jnp.dtype(dtype), senders) == taken


@pytest.mark.parametrize(
    ("mesh", "device", "reach"),
    (
        ((1, 1), "mosaic_gpu", True),
        ((2, 1), "mosaic_gpu", True),
        ((1, 2), None, True),
        ((1, 2), "mosaic_gpu", False),
    ),
)
def test_sums_are_left_to_xla_where_the_kernel_cannot_be(monkeypatch, mesh, device, reach):
    monkeypatch.setattr(api, "kernels_of_device", lambda: device)
    monkeypatch.setattr(peers, "reach_each_other", lambda: reach)
    with jax.set_mesh(rj.make_mesh(*mesh)):
        assert open_mailbox(4, 4096, "bfloat16") is None


def test_a_mailbox_is_opened_on_every_device(monkeypatch):
    """Where devices reach each other; what the kernel writes is made up here."""

    def open_cells(rows, width, dtype, senders):
        here = jax.lax.axis_index(HEADS)
        return jnp.zeros((1, 2, rows, senders, width), dtype), jnp.stack([here, 7 + here])[None]

    monkeypatch.setattr(api, "kernels_of_device", lambda: "mosaic_gpu")
    monkeypatch.setattr(peers, "reach_each_other", lambda: True)
    monkeypatch.setattr(kernels, "open_cells", open_cells)

    def opened():
        mailbox = open_mailbox(4, 1024, "bfloat16")
        assert isinstance(mailbox, Mailbox)
        return mailbox.cells[...], mailbox.addresses

    with jax.set_mesh(rj.make_mesh(2, 2)):
        cells, addresses = jax.jit(opened)()
    assert cells.shape == (4, 2, 4, 2, 1024)
    assert addresses.tolist() == [[[0, 7], [1, 8]]] * 4


@pytest.mark.parametrize(("answers", "reach"), (([0, 0], True), ([0, 1], False)))
def test_the_driver_is_asked_for_every_pair_of_gpus(monkeypatch, answers, reach):
    asked = []

    def can_access(can, one, other):
        asked.append((one, other))
        can._obj.value = 1
        return answers[len(asked) - 1]

    monkeypatch.setattr(peers.ctypes, "CDLL", lambda _: SimpleNamespace(cuDeviceCanAccessPeer=can_access))
    peers._driver_says.cache_clear()
    assert peers._driver_says((3, 5)) is reach
    assert asked == [(3, 5), (5, 3)]
    peers._driver_says.cache_clear()


def test_without_a_driver_no_gpu_is_reached():
    peers._driver_says.cache_clear()
    assert not peers.reach_each_other() or jax.devices()[0].platform == "gpu"
