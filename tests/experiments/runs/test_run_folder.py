import errno
import json
import os

import pytest

from retro_jax.experiments.runs.folder import RunFolder, read_results

IDENTITY = {"name": "x", "config": {"task": {"n": 3}}}


def line(number):
    return {"example": f"e{number}", "method": "full", "sample": 0, "text": "ü" * number}


def test_a_torn_last_line_is_cut_off(tmp_path):
    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.append([line(1), line(2)])
    file = tmp_path / "results-0.jsonl"
    whole = file.read_bytes()
    for cut in range(1, len(json.dumps(line(2), ensure_ascii=False).encode()) + 1):
        file.write_bytes(whole[:-cut])
        assert [found["example"] for found in read_results(tmp_path)] == ["e1"]
    for damaged in (whole[:-3], whole[:-8] + b"\0\0\0\n"):
        file.write_bytes(damaged)
        with RunFolder(tmp_path, IDENTITY) as folder:
            assert folder.done() == {("e1", "full", 0)}
            folder.append([line(2)])
        assert file.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.append([line(1), line(2)])
        file = tmp_path / "results-0.jsonl"
        file.write_bytes(b"{broken\n" + file.read_bytes())
        with pytest.raises(ValueError, match=r"results-0\.jsonl line 1 is broken"):
            folder.done()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    real, calls = os.write, []

    def full(file, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[: len(data) // 2])  # half of it still fits

    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.append([line(1)])
        before = (tmp_path / "results-0.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match=r"No space left on device.*is intact: free some space"):
                folder.append([line(2), line(3)])
        assert len(calls) == 2
        assert (tmp_path / "results-0.jsonl").read_bytes() == before
        folder.append([line(2)])
    assert len(read_results(tmp_path)) == 2


def test_one_writer_at_a_time(tmp_path):
    with (
        RunFolder(tmp_path, IDENTITY),
        pytest.raises(ValueError, match="another process is writing"),
        RunFolder(tmp_path, IDENTITY),
    ):
        pass
    with RunFolder(tmp_path, IDENTITY):  # it was let go
        pass


def test_hosts_are_merged_and_nothing_is_there_twice(tmp_path):
    for process in (0, 1):
        with RunFolder(tmp_path, IDENTITY, process) as folder:
            folder.append([line(process)])
    assert [found["example"] for found in read_results(tmp_path)] == ["e0", "e1"]
    with RunFolder(tmp_path, IDENTITY, 1) as folder:
        folder.append([line(0)])
    with pytest.raises(ValueError, match="two results for e0, full, 0"):
        read_results(tmp_path)


def test_a_kill_while_the_config_is_written_is_no_obstacle(tmp_path):
    (tmp_path / "config.partial123").write_text("{")
    with RunFolder(tmp_path, IDENTITY) as folder:
        assert folder.done() == set()
    with pytest.raises(ValueError, match=r"holds another run \(config.task.n 3, not 4\)"):
        RunFolder(tmp_path, {"name": "x", "config": {"task": {"n": 4}}})


def test_times_that_do_not_fit_on_the_disk_leave_what_was_there(tmp_path, monkeypatch):
    def full(file, data):
        real(file, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.note("timings-0.jsonl", {"a": 1})
        real = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(
                OSError, match=r"could not write to .*timings-0\.jsonl \(No space left on device\)"
            ):
                folder.note("timings-0.jsonl", {"a": 2})
    assert (tmp_path / "timings-0.jsonl").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("damage", [b"", b'{"name": "x"', b"\0\0\0", b"[]", b"\xff"])
def test_a_damaged_config_is_named(tmp_path, damage):
    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.append([line(1)])
    (tmp_path / "config.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"config\.json is damaged \(.*; restore it, or start anew"):
        RunFolder.check(tmp_path, IDENTITY)


def test_a_folder_that_cannot_be_written_is_refused_at_the_door(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"file is a file, so .*file/run cannot be a folder; choose another --out"
    ):
        RunFolder.check(tmp_path / "file" / "run", IDENTITY)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=f"{tmp_path} cannot be written to; choose another --out"):
        RunFolder.check(tmp_path / "new" / "run", IDENTITY)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with (
        pytest.raises(OSError, match=r"cannot be locked \(No locks available\)"),
        RunFolder(tmp_path, IDENTITY),
    ):
        pass


def test_names_with_spaces_and_umlauts(tmp_path):
    with RunFolder(tmp_path / "mit leer \u00fcn\u00ef" / "r", IDENTITY) as folder:
        folder.append([line(1)])
        assert folder.done() == {("e1", "full", 0)}
