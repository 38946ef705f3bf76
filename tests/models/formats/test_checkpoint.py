"""Folders that orbax writes: what comes back, and what is refused."""

import json
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from retro_jax.models.formats.checkpoint import (
    check_new,
    is_checkpoint,
    read_about,
    read_arrays,
    write_checkpoint,
)

ARRAYS = {
    "layers.0.pages": jnp.arange(2400, dtype=jnp.bfloat16).reshape(2, 3, 400),
    "codes": jnp.arange(-4, 4, dtype=jnp.int8),
    "eighth": jnp.arange(8).astype(jnp.float8_e4m3fn),
    "alive": jnp.array([True, False]),
    "empty": jnp.zeros((2, 0)),
}


def targets(**shapes):
    place = SingleDeviceSharding(jax.devices()[1])
    return {
        name: jax.ShapeDtypeStruct(shapes.get(name, array.shape), array.dtype, sharding=place)
        for name, array in ARRAYS.items()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "in" / "here"
    write_checkpoint(folder, "thing", {"note": "ü"}, ARRAYS, more={"x": [1]})
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_arrays_come_back_where_they_are_wanted(written):
    about = read_about(written, "thing")
    assert about["note"] == "ü" and json.loads((written / "more" / "more.json").read_text()) == {"x": [1]}
    found = read_arrays(written, about, targets())
    assert found.keys() == ARRAYS.keys() - {"empty"}
    for name, array in found.items():
        assert array.dtype == ARRAYS[name].dtype and array.devices() == {jax.devices()[1]}
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_longer_arrays_are_filled_up(written):
    found = read_arrays(written, read_about(written, "thing"), targets(**{"layers.0.pages": (3, 3, 402)}))
    expected = np.pad(ARRAYS["layers.0.pages"], ((0, 1), (0, 0), (0, 2)))
    np.testing.assert_array_equal(found["layers.0.pages"], expected)


def flip(file):
    contents = bytearray(file.read_bytes())
    at = contents.index(np.asarray(ARRAYS["layers.0.pages"]).tobytes())
    contents[at + 5] ^= 1
    file.write_bytes(contents)


def data_file(folder):
    return max(folder.glob("arrays/ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)


def change(folder, **values):
    file = folder / "about" / "about.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE = {
    "cut": (lambda f: data_file(f).write_bytes(data_file(f).read_bytes()[:9]), "copy is damaged"),
    "lost": (lambda f: data_file(f).unlink(), "copy is damaged"),
    "flipped": (lambda f: flip(data_file(f)), r"damaged \(its arrays are not those that were written\)"),
    "no arrays": (lambda f: shutil.rmtree(f / "arrays"), "copy is damaged"),
    "no about": (lambda f: shutil.rmtree(f / "about"), r"it has no about/about\.json"),
    "cut about": (lambda f: (f / "about" / "about.json").write_text("{"), r"damaged \(.*about\.json: Expect"),
    "no object": (lambda f: (f / "about" / "about.json").write_text("[]"), "about.json holds no JSON object"),
    "kind": (lambda f: change(f, kind="state"), "copy holds a state, not a thing"),
    "version": (lambda f: change(f, version=99), "has the format 99 of retro-jax .*, this version reads 1"),
    "stopped": (lambda f: f.rename(f"{f}.orbax-checkpoint-tmp"), r"copy is half-written \(copy\.orbax-check"),
    "stopped within": (
        lambda f: (f / "arrays").rename(f / "arrays.orbax-checkpoint-tmp"),
        r"copy is half-written \(arrays\.orbax-checkpoint-tmp is left",
    ),
    "gone": (shutil.rmtree, "there is no folder .*copy"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told(copy, damage):
    do, message = DAMAGE[damage]
    do(copy)
    with pytest.raises(FileNotFoundError if damage == "gone" else ValueError, match=message):
        read_arrays(copy, read_about(copy, "thing"), targets())
    assert is_checkpoint(copy) == (damage not in ("no about", "gone"))


def test_arrays_of_another_version_are_named(written):
    wanted = targets(codes=(7,), **{"layers.0.pages": (2, 3)})
    wanted["later"] = wanted.pop("alive")
    message = (
        "4 problems: missing: later (2,); unexpected: alive (2,); wrong shape: layers.0.pages is "
        "(2, 3, 400), not (2, 3); wrong shape: codes is (8,), not (7,)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        read_arrays(written, read_about(written, "thing"), wanted)


def test_what_is_there_is_kept(written, tmp_path):
    with pytest.raises(FileExistsError, match="here exists and is not overwritten; choose another folder"):
        write_checkpoint(written, "thing", {}, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"file is a file, so .*deep cannot be a folder"):
        check_new(tmp_path / "file" / "deep")


def test_a_full_disk_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"could not write .*full \(File too large\); nothing of it was kept"
        ):
            write_checkpoint(tmp_path / "full", "thing", {}, {"a": jnp.ones(1000)})
        with pytest.raises(OSError, match="nothing of it was kept"):
            write_checkpoint(tmp_path / "full", "thing", {"long": "x" * 2000}, {"a": jnp.ones(1)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    (tmp_path / "later.orbax-checkpoint-tmp").mkdir()  # of another that was killed
    write_checkpoint(tmp_path / "later", "thing", {}, {"a": jnp.ones(1000)})
    assert [path.name for path in tmp_path.iterdir()] == ["later"]
