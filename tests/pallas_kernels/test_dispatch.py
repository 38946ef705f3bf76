import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch as dispatch_module
from pallas_kernels import gpu, tpu
from pallas_kernels.dispatch import by_sequence, dispatch


def reference(x):
    return "reference", x


def kernel(x):
    if x == 96:
        raise NotImplementedError("head_dim 96 is not supported (64, 128, 256)")
    return "kernel", x


BOTH = {"xla": reference, "mosaic_gpu": kernel}
SPREAD = by_sequence(1), *by_sequence(1)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch_module, "kernels_of_device", lambda: "mosaic_gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    dispatch_module._warn_once.cache_clear()


def test_none_picks_the_kernel_of_the_backend(on_a_gpu):
    assert dispatch("op", None, BOTH, SPREAD, 64) == ("kernel", 64)
    assert dispatch("op", None, {"xla": reference}, SPREAD, 64) == ("reference", 64)


def test_none_picks_the_reference_elsewhere():
    assert dispatch("op", None, BOTH, SPREAD, 64) == ("reference", 64)


def test_an_unsupported_shape_falls_back_with_one_warning(on_a_gpu, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch("op", None, BOTH, SPREAD, 96) == ("reference", 96)
    assert [record.message for record in caplog.records] == [
        "head_dim 96 is not supported (64, 128, 256); using the XLA reference"
    ]


def test_a_reason_is_logged_once_for_all_operations_and_a_missing_kernel_for_each(on_a_gpu, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for operation, candidates in (("one", BOTH), ("two", BOTH), ("three", {"xla": reference})):
                assert dispatch(operation, None, candidates, SPREAD, 96) == ("reference", 96)
    assert [record.message for record in caplog.records] == [
        "head_dim 96 is not supported (64, 128, 256); using the XLA reference",
        "three has no 'mosaic_gpu' implementation; using the XLA reference",
    ]
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert dispatch("three", "xla", {"xla": reference}, SPREAD, 96) == ("reference", 96)
    assert not caplog.records  # nothing was missed: it was asked for


def test_a_named_implementation_is_used_or_its_error_raised(on_a_gpu):
    assert dispatch("op", "mosaic_gpu", BOTH, SPREAD, 64) == ("kernel", 64)
    with pytest.raises(NotImplementedError, match=r"op: head_dim 96 .*; use implementation=None"):
        dispatch("op", "mosaic_gpu", BOTH, SPREAD, 96)
    with pytest.raises(NotImplementedError, match="op has no 'mosaic_tpu' implementation"):
        dispatch("op", "mosaic_tpu", BOTH, SPREAD, 64)
    with pytest.raises(ValueError, match="implementation 'triton' is unknown"):
        dispatch("op", "triton", BOTH, SPREAD, 64)


class Device:
    def __init__(self, platform, device_kind, compute_capability=None):
        self.platform, self.device_kind, self.compute_capability = platform, device_kind, compute_capability


@pytest.mark.parametrize(
    ("device", "kernels"),
    [
        (Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), "mosaic_gpu"),
        (Device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"), None),
        (Device("tpu", "TPU v5 lite"), "mosaic_tpu"),
        (Device("cpu", "cpu"), None),
    ],
)
def test_which_kernels_a_device_has(monkeypatch, device, kernels):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert dispatch_module.kernels_of_device() == kernels


@pytest.mark.parametrize(
    ("absent", "kernels"),
    [
        (("NVIDIA H100 80GB HBM3", 132, "gpu"), "mosaic_gpu"),
        (("NVIDIA A100-SXM4-80GB", 108, "gpu"), None),
        (("TPU v6 lite", 1, "tpu"), "mosaic_tpu"),
    ],
)
def test_which_kernels_an_absent_device_has(absent, kernels):
    device = jax.sharding.AbstractDevice(*absent)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch_module.kernels_of_device() == kernels
        if kernels == "mosaic_gpu":
            assert (gpu.chip(), gpu.num_multiprocessors()) == ("H100", 132)


@pytest.mark.parametrize("kind", ["TPU v3", "TPU8i", "TPU of tomorrow"])
def test_a_tpu_that_no_kernel_was_made_for_is_not_taken_for_another(kind):
    device = jax.sharding.AbstractDevice(kind, 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(NotImplementedError, match=rf"{kind} has no Mosaic TPU kernel \(v4, v5e"),
    ):
        tpu.chip()


def test_kernels_are_not_left_to_the_partitioner(on_a_gpu, monkeypatch, caplog):
    """Among several devices XLA would gather all operands on each of them."""
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with caplog.at_level(logging.WARNING):
        assert dispatch("op", None, BOTH, SPREAD, 64) == ("reference", 64)
    assert "XLA cannot partition the kernel among 4 devices" in caplog.text

    inside = []
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("model",), axis_types=auto, devices=jax.local_devices())

    def part(x):
        inside.append(dispatch("op", None, BOTH, SPREAD, 64))
        return x

    jax.jit(jax.shard_map(part, mesh=mesh, in_specs=P("model"), out_specs=P("model")))(jnp.zeros(4))
    assert inside == [("kernel", 64)]


def test_under_a_mesh_every_device_runs_the_kernel_on_its_own_part(on_a_gpu):
    x = jnp.arange(16.0).reshape(4, 4)
    doubled = {"xla": lambda x: -x, "mosaic_gpu": lambda x: x * 2 + x.shape[0] * 10 + x.shape[1]}
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=auto, devices=jax.local_devices())
    with jax.set_mesh(mesh):
        result = jax.jit(lambda x: dispatch("op", None, doubled, SPREAD, x))(x)
    np.testing.assert_array_equal(result, x * 2 + 22)
    assert result.sharding.shard_shape(x.shape) == (2, 2)


@pytest.mark.parametrize(
    ("names", "kind"),
    [(("data", "heads"), jax.sharding.AxisType.Auto), (("data", "model"), jax.sharding.AxisType.Explicit)],
)
def test_a_mesh_of_other_axes_is_named(on_a_gpu, names, kind):
    mesh = jax.make_mesh((2, 2), names, axis_types=(kind,) * 2, devices=jax.local_devices())
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match=f"mesh has axes .*{names[1]}.*{kind.name}"),
    ):
        dispatch("op", "mosaic_gpu", BOTH, SPREAD, 64)


def test_kernels_are_refused_where_they_do_not_run():
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' kernels do not run on cpu"):
        dispatch("op", "mosaic_gpu", BOTH, SPREAD, 64)
