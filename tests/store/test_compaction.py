"""Parts are merged inside commits: few files, the same rows, and nothing that cannot be undone."""

import numpy as np
import pandas as pd
import pytest

from dmrl_ray.results.reading import load
from dmrl_ray.store import compaction
from dmrl_ray.store.commit_records import newest_commit, verify
from dmrl_ray.store.files import FileRecord
from dmrl_ray.store.writer import RunWriter
from tests.store.small_run import add, create, make_run, step


@pytest.fixture(autouse=True)
def small_tiers(monkeypatch):
    monkeypatch.setattr(compaction, "TIER", 3)


def values(folder):
    return load(folder, "metrics")["value"].tolist()


def sizes_of(*sizes):
    return [FileRecord(str(n), size, "") for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "merged"),
    [
        ([10, 10], []),
        ([10, 10, 10], [0, 1, 2]),
        ([100, 10, 10, 10], [1, 2, 3]),
        ([100, 100, 10, 10], []),
        ([100, 100, 100, 10], [0, 1, 2, 3]),
        ([10, 100, 200, 100, 200, 10], []),
        ([10, 200, 100, 200, 200, 10], [0, 1, 2, 3, 4, 5]),
        ([10, 10, 10, 5000, 10], []),
        ([300, 300, 300], [0, 1, 2]),
        ([2000, 300, 300, 10], []),
    ],
)
def test_as_many_parts_of_a_tier_as_make_one_of_the_next_are_merged(monkeypatch, sizes, merged):
    # Tiers begin at 0, 50, 150, 450 and 1350 bytes.
    monkeypatch.setattr(compaction, "SMALL_BYTES", 50)
    monkeypatch.setattr(compaction, "LARGE_BYTES", 4000)
    parts = sizes_of(*sizes)
    assert [int(part.path) for part in compaction.mergeable(parts)] == merged


def test_a_run_of_many_commits_has_few_files_and_all_rows_in_order(tmp_path):
    folder = make_run(tmp_path / "run", 40)
    assert values(folder) == list(range(160))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) < 20
    assert len(list((folder / "commits").iterdir())) == 3
    visible = sorted((folder / "metrics").glob("*.parquet"))
    rows = pd.concat(map(pd.read_parquet, visible))
    assert rows["value"].tolist() == list(range(160)), "for those who do not read commits"
    assert verify(folder) == []
    with RunWriter.open(folder) as writer:
        assert (writer.number, writer.recovery) == (40, [])


def test_records_do_not_grow_with_the_number_of_commits(tmp_path):
    sizes = []
    with create(tmp_path / "run") as writer:
        for number in range(60):
            step(writer, number)
            (*_, newest) = sorted((tmp_path / "run" / "commits").iterdir())
            sizes.append(newest.stat().st_size)
    assert max(sizes[30:]) <= 1.01 * max(sizes[:10])


def test_a_damaged_merged_part_is_undone_with_its_commit(tmp_path):
    folder = make_run(tmp_path / "run", 4)
    parts = [part.path for part in newest_commit(folder).parts]
    assert len(parts) == 2, "three parts are merged by the fourth commit"
    (folder / parts[0]).write_bytes(b"")
    with RunWriter.open(folder) as writer:
        assert writer.recovery[-1] == "continuing from commit 3"
        step(writer, 3)
    assert values(folder) == list(range(16))
    assert verify(folder) == []


def test_a_damaged_part_is_not_merged_and_stays_known_as_damaged(tmp_path, caplog):
    with create(tmp_path / "run") as writer:
        for number in range(6):
            step(writer, number)
            if number == 2:
                damaged = next((tmp_path / "run" / "metrics").glob("part-00000002-*"))
                damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "is not as it was committed" in caplog.text
    assert len(caplog.records) == 1, "it is told once"
    assert str(damaged) in verify(tmp_path / "run")[0]


def test_columns_that_only_some_parts_have_are_merged(tmp_path):
    with create(tmp_path / "run") as writer:
        for number, name in enumerate("abacb"):
            task = {"family": "f", "split": "train", "params": "{}", f"param.{name}": 1.5}
            writer.add("tasks", {"task_id": f"t{number}", **task})
            writer.commit({}, {})
    assert len(newest_commit(tmp_path / "run").parts) < 5
    rows = load(tmp_path / "run", "tasks")
    assert rows["task_id"].tolist() == [f"t{number}" for number in range(5)]
    np.testing.assert_array_equal(rows["param.b"], [np.nan, 1.5, np.nan, np.nan, 1.5])


def test_forgotten_rows_leave_the_disk_with_the_last_commit_that_names_them(tmp_path):
    folder = make_run(tmp_path / "run", 5)
    with RunWriter.open(folder) as writer:
        writer.forget(["s"])
        for _ in range(3):
            assert any((folder / "metrics").iterdir())
            add(writer, 0, rows=0)
            writer.commit({}, {})
    assert list((folder / "metrics").iterdir()) == []


def test_no_pattern_for_parquet_finds_what_is_not_in_the_newest_commit(tmp_path):
    folder = make_run(tmp_path / "run", 4)
    hidden = list((folder / "metrics").glob("_*"))
    assert len(hidden) == 3, "merged, and kept for going back"
    assert not set(hidden) & set((folder / "metrics").glob("*.parquet"))
