"""Rows and checkpoint files of a run: committed whole, kept, and given back."""

import errno
import os
import re

import numpy as np
import pytest

from dmrl_ray.errors import StorageError
from dmrl_ray.results.reading import load
from dmrl_ray.store.commit_records import verify
from dmrl_ray.store.writer import RunWriter
from tests.store.small_run import add, create, make_run


def values(folder):
    return load(folder, "metrics")["value"].tolist()


def test_an_opened_run_has_the_state_and_files_of_its_last_commit(tmp_path):
    folder = make_run(tmp_path / "run", 5)
    with RunWriter.open(folder) as writer:
        assert (writer.number, writer.state, writer.recovery) == (5, {"step": 5}, [])
        np.testing.assert_array_equal(writer.load("last")["w"], np.full(3, 4))
        with pytest.raises(ValueError, match="no checkpoint 'best' in use; there are: last"):
            writer.load("best")


def test_rows_that_were_not_committed_are_gone(tmp_path):
    folder = make_run(tmp_path / "run", 2)
    with RunWriter.open(folder) as writer:
        add(writer, 100)
    assert values(folder) == list(range(8))


def test_a_run_without_a_commit_starts_without_a_state(tmp_path):
    create(tmp_path / "run").close()
    with RunWriter.open(tmp_path / "run") as writer:
        assert (writer.number, writer.state, writer.files) == (0, None, {})


def test_the_files_of_the_newest_commits_are_kept_and_others_deleted(tmp_path):
    folder = make_run(tmp_path / "run", 6, keep=2)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["last-00000005.safetensors", "last-00000006.safetensors"]


def test_a_file_saved_twice_before_a_commit_is_two_files(tmp_path):
    with create(tmp_path / "run") as writer:
        first, second = (writer.save("a/b", {"w": np.full(1, n)}) for n in range(2))
        writer.commit({}, {"first": first, "second": second})
        assert [writer.load(name)["w"][0] for name in ("first", "second")] == [0, 1]


def test_a_file_may_be_named_by_the_commit_after_the_next(tmp_path):
    with create(tmp_path / "run", keep=2) as writer:
        early = writer.save("early", {"w": np.ones(1)})
        writer.commit({}, {})
        writer.commit({}, {"early": early})
        assert writer.load("early")["w"] == 1


def test_a_run_keeps_its_id_when_its_folder_moves(tmp_path):
    moved = make_run(tmp_path / "run", 1).rename(tmp_path / "other")
    with RunWriter.open(moved) as writer:
        add(writer, 4)
        writer.commit({}, {})
    (run_id,) = load(moved, "metrics")["run_id"].unique()
    assert re.fullmatch("run-[0-9a-f]{12}", run_id)


def test_a_run_that_is_overwritten_is_another(tmp_path):
    ids = []
    for _ in range(2):
        with create(tmp_path / "run", overwrite=True) as writer:
            ids.append(writer.run_id)
    assert ids[0] != ids[1]


def test_two_writers_never_give_one_name_to_their_parts(tmp_path):
    task = {"run_id": "same", "task_id": "t", "family": "f", "split": "train", "params": "{}"}
    for name in ("a", "b"):
        with create(tmp_path / name) as writer:
            writer.add("tasks", task)
            writer.commit({}, {})
    assert len({path.name for path in tmp_path.glob("*/tasks/*")}) == 2


@pytest.mark.parametrize("call", ["fsync", "rename", "link", "unlink", "open"])
def test_a_commit_that_fails_anywhere_can_be_repeated(tmp_path, monkeypatch, call):
    real, countdown = getattr(os, call), [0]

    def failing(*args, **options):
        countdown[0] -= 1
        if countdown[0] == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **options)

    failures = 0
    with create(tmp_path / "run", keep=2) as writer:
        monkeypatch.setattr(os, call, failing)
        for number in range(12):
            add(writer, 4 * number)
            countdown[0] = number + 1
            try:
                files = {"last": writer.save("last", {"w": np.ones(1)})}
                writer.commit({}, files)
            except StorageError:
                failures += 1
        countdown[0] = 0
        writer.commit({}, {})
    monkeypatch.undo()
    assert values(tmp_path / "run") == list(range(48))
    RunWriter.open(tmp_path / "run").close()
    assert verify(tmp_path / "run") == []
    assert values(tmp_path / "run") == list(range(48))
    assert failures >= 1 or call == "unlink"


BAD_ROWS = {
    "'valu' is not a column": {"valu": 1.0},
    "metrics.value: has 3 rows instead of 2": {"name": ["a", "b"], "value": np.ones(3)},
    "metrics.policy_version: Cannot cast": {"policy_version": 1.5},
    "metrics.name: ": {"name": 3},
    "metrics.job: is None": {"job": None},
    "metrics.value: Cannot cast": {"value": "much"},
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_bad_row_is_refused_when_it_is_added(tmp_path, message):
    good = {"stage": "s", "job": "j", "policy_version": 1, "env_steps": 1, "name": "n", "value": 1}
    with create(tmp_path / "run") as writer:
        with pytest.raises(ValueError, match=re.escape(message)):
            writer.add("metrics", {**good, **BAD_ROWS[message]})
        with pytest.raises(ValueError, match="lacks the columns name"):
            writer.add("metrics", {k: v for k, v in good.items() if k != "name"})
        with pytest.raises(ValueError, match="did you mean 'metrics'"):
            writer.add("metric", good)


def test_rows_are_copied_when_they_are_added(tmp_path):
    value = np.zeros(2)
    same = {"stage": "s", "job": "j", "policy_version": 0, "env_steps": 0, "name": "n"}
    with create(tmp_path / "run") as writer:
        writer.add("metrics", {**same, "value": value})
        value += 1
        writer.commit({}, {})
    assert values(tmp_path / "run") == [0, 0]
