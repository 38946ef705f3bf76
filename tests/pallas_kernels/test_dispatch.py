import logging

import jax
import pytest

from pallas_kernels import dispatch as dispatch_module
from pallas_kernels.dispatch import dispatch


def reference(x):
    return "reference", x


def kernel(x):
    if x == 96:
        raise NotImplementedError("head_dim 96 is not supported (64, 128, 256)")
    return "kernel", x


BOTH = {"xla": reference, "mosaic_gpu": kernel}


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    dispatch_module._warn_once.cache_clear()


def test_none_picks_the_kernel_of_the_backend(on_a_gpu):
    assert dispatch("op", None, BOTH, 64) == ("kernel", 64)
    assert dispatch("op", None, {"xla": reference}, 64) == ("reference", 64)


def test_none_picks_the_reference_elsewhere():
    assert dispatch("op", None, BOTH, 64) == ("reference", 64)


def test_an_unsupported_shape_falls_back_with_one_warning(on_a_gpu, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch("op", None, BOTH, 96) == ("reference", 96)
    assert [record.message for record in caplog.records] == [
        "op: head_dim 96 is not supported (64, 128, 256); using the XLA reference"
    ]


def test_a_named_implementation_is_used_or_its_error_raised():
    assert dispatch("op", "mosaic_gpu", BOTH, 64) == ("kernel", 64)
    with pytest.raises(NotImplementedError, match="head_dim 96"):
        dispatch("op", "mosaic_gpu", BOTH, 96)
    with pytest.raises(NotImplementedError, match="op has no 'mosaic_tpu' implementation"):
        dispatch("op", "mosaic_tpu", BOTH, 64)
    with pytest.raises(ValueError, match="implementation 'triton' is unknown"):
        dispatch("op", "triton", BOTH, 64)
