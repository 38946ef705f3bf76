import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.models.fingerprint import fingerprint, named_arrays

VALUES = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def changed(change):
    values = VALUES.copy()
    change(values)
    return values


@pytest.mark.parametrize(
    "other",
    [
        changed(lambda v: v.view(np.uint32).__setitem__((2, 3), v.view(np.uint32)[2, 3] ^ 1)),
        -VALUES,
        VALUES[::-1].copy(),
        VALUES.reshape(6, 4),
        VALUES.view(np.int32),
        changed(lambda v: v.__setitem__((0, slice(0, 2)), v[0, 1::-1].copy())),
    ],
    ids=["one bit", "all signs", "order", "shape", "dtype", "two swapped"],
)
def test_other_arrays_have_another(other):
    assert fingerprint({"a": other}) != fingerprint({"a": VALUES}) != fingerprint({"b": VALUES})


@pytest.mark.parametrize(
    ("dtype", "specs"),
    [
        (np.float32, (P(), P("data"), P("data", "model"))),
        (jnp.bfloat16, (P(None, "model"),)),
        (ml_dtypes.float8_e4m3fn, (P(),)),
        (np.bool_, (P(),)),
    ],
)
def test_it_is_the_same_wherever_arrays_lie(dtype, specs):
    array = VALUES.astype(dtype)
    expected = fingerprint({"a": array})
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    for spec in specs:
        assert fingerprint({"a": jax.device_put(array, NamedSharding(mesh, spec))}) == expected
    with jax.set_mesh(mesh), jax.enable_x64(True):
        assert fingerprint({"a": jax.device_put(array, jax.devices()[3])}) == expected
    longer = np.pad(array, ((0, 2), (0, 1)), constant_values=array[0, 0])
    assert fingerprint({"a": longer}, {"a": array.shape}) == expected


def test_names_are_paths():
    assert list(named_arrays({"layers": [{"wo": VALUES}, {"wo": VALUES}]})) == ["layers.0.wo", "layers.1.wo"]
