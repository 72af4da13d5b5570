"""Arrays come back as they were, or an error names the file."""

import errno
import multiprocessing
import os

import numpy as np
import pytest

from dmrl_ray.errors import StorageError
from dmrl_ray.store.files import (
    FileRecord,
    LocalFiles,
    atomic_file,
    is_numeric,
    load_arrays,
    save_arrays,
)

NUMBERS = {
    "policy.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "scalar": np.float64(3.5) * np.ones(()),
    "empty": np.zeros((0, 4), np.int64),
    "flags": np.array([True, False]),
    "half": np.array([1.5], np.float16),
    "big_endian": np.array([1, 2, 3], ">i4"),
}
ANYTHING = {
    **NUMBERS,
    "file": np.array("a name that np.savez cannot store"),
    "words": np.array(["a", "élan", ""]),
    "a/b": np.array([1 + 2j]),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype.newbyteorder("=") or name == "big_endian"


@pytest.mark.parametrize(
    ("path", "arrays"),
    [("a.safetensors", NUMBERS), ("a.safetensors", {}), ("a.npz", ANYTHING), ("a.npz", {})],
)
def test_arrays_come_back_with_values_shapes_and_dtypes(tmp_path, path, arrays):
    record = save_arrays(LocalFiles(tmp_path), path, arrays, {"policy": "x"})
    assert_same(load_arrays(LocalFiles(tmp_path), record), arrays)
    assert record.size_bytes == (tmp_path / path).stat().st_size


def test_the_same_arrays_make_the_same_file(tmp_path):
    for suffix, arrays in (("safetensors", NUMBERS), ("npz", ANYTHING)):
        first = save_arrays(LocalFiles(tmp_path), f"a.{suffix}", arrays)
        assert save_arrays(LocalFiles(tmp_path), f"b.{suffix}", arrays).sha256 == first.sha256


def test_strings_and_complex_numbers_are_not_numeric():
    assert is_numeric(NUMBERS)
    assert not is_numeric({"a": np.array("text")})
    assert not is_numeric({"a": np.array([1j])})


@pytest.mark.parametrize("path", ["a.npz", "a.safetensors"])
def test_python_objects_are_refused(tmp_path, path):
    with pytest.raises(ValueError, match="'bad' holds Python objects"):
        save_arrays(LocalFiles(tmp_path), path, {"bad": np.array([{}, None])})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["a.npz", "a.safetensors"])
def test_every_flipped_bit_and_every_truncation_is_found(tmp_path, path):
    record = save_arrays(LocalFiles(tmp_path), path, {"w": np.arange(4.0)})
    data = (tmp_path / path).read_bytes()
    for bit in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / path).write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{path}: its sha256 is not"):
            load_arrays(LocalFiles(tmp_path), record)
    for size in range(0, len(data), 5):
        (tmp_path / path).write_bytes(data[:size])
        with pytest.raises(ValueError, match=f"{path}: has {size} bytes instead of {len(data)}"):
            load_arrays(LocalFiles(tmp_path), record)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.npz: is missing"):
        load_arrays(LocalFiles(tmp_path), FileRecord("gone.npz", 1, ""))


def test_a_record_cannot_lead_out_of_the_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record = save_arrays(LocalFiles(tmp_path), "secret.npz", {"a": np.ones(1)})
    (run / "link.npz").symlink_to(tmp_path / "secret.npz")
    out, link = "leads out of the run folder", "is a symbolic link"
    absolute = str(tmp_path / "secret.npz")
    for path, why in (("../secret.npz", out), (absolute, out), ("link.npz", link)):
        with pytest.raises(ValueError, match=why):
            load_arrays(LocalFiles(run), FileRecord(path, record.size_bytes, record.sha256))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    save_arrays(LocalFiles(tmp_path), "a.npz", {"a": np.ones(1)})
    before = (tmp_path / "a.npz").read_bytes()

    def fail():
        with atomic_file(tmp_path / "a.npz") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "a.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_a_storage_error_with_path_and_room(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"a\.npz.*No space left.*MiB free there") as caught:
        save_arrays(LocalFiles(tmp_path), "a.npz", {"a": np.ones(1)})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def _race(folder, name, barrier, wins):
    for number in range(20):
        barrier.wait()
        if LocalFiles(folder).put_if_absent(f"{number}.json", name.encode()):
            wins.put((number, name))


def test_of_four_racing_processes_exactly_one_puts_each_file(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, n, barrier, wins)) for n in "abcd"]
    for racer in racers:
        racer.start()
    won = dict(wins.get(timeout=20) for _ in range(20))
    for racer in racers:
        racer.join()
    assert wins.empty()
    assert {n: (tmp_path / f"{n}.json").read_text() for n in range(20)} == won
    assert len(list(tmp_path.iterdir())) == 20
