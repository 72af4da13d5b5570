"""Reading results: every committed row of every run once, damage named, figures by hand."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dmrl_ray
from dmrl_ray.results import adaptation, bootstrap_interval, iqm, load
from dmrl_ray.tables import SCHEMAS
from dmrl_ray.writer import RunWriter

EPISODE = {
    "stage": "test",
    "job": "j",
    "algorithm": "ppo",
    "task_id": "t",
    "split": "test",
    **dict.fromkeys(
        ["seed", "trial", "episode", "adaptation_step", "policy_version", "env_steps"], 0
    ),
    "return": 1.5,
    "length": 10,
}


def make_run(folder, *chunks):
    """A run with one commit per chunk of episodes."""
    with RunWriter.create(folder, "", {}) as writer:
        for chunk in chunks:
            writer.add("episodes", {**EPISODE, **chunk})
            writer.commit({}, {})
    return folder


def part(folder):
    (path,) = (folder / "episodes").iterdir()
    return path


def rewrite(folder, table):
    """Replace a run's only part by another table, of which no commit and no checksum knows."""
    (folder / "commits" / "00000001.json").unlink()
    part(folder).unlink()
    pq.write_table(table, folder / "episodes" / "part-x.parquet")


def test_rows_come_back_as_they_were_added(tmp_path):
    rows = {
        "task_id": np.array(["a", "b", "c"]),
        "trial": [3, 1, 2],
        "return": np.array([1, 2, 3], np.float32),
        "success": [True, None, False],
        "score": [0.5, np.nan, None],
        "time": np.array([0.25, 1.0, 1e9]),
    }
    frame = load(make_run(tmp_path / "run", rows))
    assert list(frame.columns) == SCHEMAS["episodes"].names
    assert frame["run_id"].tolist() == ["run"] * 3
    assert frame["task_id"].tolist() == ["a", "b", "c"]
    assert frame["trial"].tolist() == [3, 1, 2]
    assert frame["return"].tolist() == [1.0, 2.0, 3.0]
    assert frame["success"].isna().tolist() == [False, True, False]
    assert frame["success"].mean() == 0.5
    assert frame["score"].isna().tolist() == [False, True, True]
    assert frame["time"][0] == pd.Timestamp("1970-01-01 00:00:00.25", tz="UTC")
    assert frame["length"].tolist() == [10] * 3


def test_a_nan_metric_stays_and_events_are_json(tmp_path):
    where = {"stage": "s", "job": "j"}
    with RunWriter.create(tmp_path / "run", "", {}) as writer:
        same = {**where, "policy_version": 1, "env_steps": 2}
        writer.add("metrics", {**same, "name": ["a", "b"], "value": [np.nan, np.inf]})
        writer.add("events", {**where, "event": "retry", "detail": json.dumps({"shard": 1})})
        writer.commit({}, {})
    np.testing.assert_array_equal(load(tmp_path / "run", "metrics")["value"], [np.nan, np.inf])
    assert json.loads(load(tmp_path / "run", "events")["detail"][0]) == {"shard": 1}
    file = pq.ParquetFile(next((tmp_path / "run" / "metrics").iterdir()))
    assert file.schema_arrow.metadata[b"dmrl.table"] == b"metrics"
    assert file.schema_arrow.metadata[b"dmrl.schema_version"] == b"2"


def test_runs_are_found_by_path_folder_pattern_and_list(tmp_path):
    for name in ("a1", "a2", "b"):
        make_run(tmp_path / name, {})
    (tmp_path / "not a run").mkdir()

    def found(path):
        return dmrl_ray.load(path)["run_id"].tolist()

    assert found(tmp_path / "a1") == ["a1"]
    assert found(tmp_path) == ["a1", "a2", "b"]
    assert found(f"{tmp_path}/a*") == ["a1", "a2"]
    assert found([tmp_path / "b", f"{tmp_path}/*"]) == ["b", "a1", "a2"]


def test_nothing_found_is_one_sentence_with_a_suggestion(tmp_path):
    make_run(tmp_path / "point_goal-1", {})
    with pytest.raises(ValueError, match=r"no run found there; did you mean .*point_goal-1"):
        load(tmp_path / "point_goal1")
    with pytest.raises(ValueError, match="did you mean 'episodes'"):
        load(tmp_path / "point_goal-1", "episode")


def test_a_run_without_rows_has_columns(tmp_path):
    frame = load(make_run(tmp_path / "run"))
    assert len(frame) == 0
    assert frame["return"].dtype == np.float64


def test_a_column_that_one_run_lacks_is_null_there_and_kept_elsewhere(tmp_path):
    old, new = (make_run(tmp_path / name, {"score": 0.5}) for name in ("old", "new"))
    table = pq.ParquetFile(part(old)).read()
    rewrite(old, table.drop_columns(["score", "algorithm"]))
    wider = pq.ParquetFile(part(new)).read().append_column("later", pa.array([7]))
    rewrite(new, wider)
    frame = load([old, new])
    assert frame["score"].isna().tolist() == [True, False]
    assert frame["algorithm"].isna().tolist() == [True, False]
    assert frame["later"].isna().tolist() == [True, False]


def test_every_flipped_bit_of_a_part_is_found(tmp_path):
    path = part(make_run(tmp_path / "run", {"trial": np.arange(50)}))
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 211):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{path.name}: is damaged"):
            load(tmp_path / "run")


def test_page_checksums_are_written_for_readers_that_know_no_names(tmp_path):
    path = part(make_run(tmp_path / "run", {"return": np.random.default_rng(0).random(50)}))
    (tmp_path / "run" / "commits" / "00000001.json").unlink()
    data = path.read_bytes()
    unnamed = path.rename(path.with_name("part-x.parquet"))
    column = pq.ParquetFile(unnamed).metadata.row_group(0).column(12)
    end = column.dictionary_page_offset + column.total_compressed_size
    for bit in range(8 * (end - 16), 8 * end):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        unnamed.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"part-x\.parquet: is damaged"):
            load(tmp_path / "run")


HOSTILE = {
    "extension type": pa.field("task_id", pa.string(), metadata={"ARROW:extension:name": "evil"}),
    "nested": pa.field("later", pa.list_(pa.string())),
    "binary": pa.field("task_id", pa.binary()),
    "other type": pa.field("return", pa.string()),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_column_of_another_type_is_refused_before_it_is_read(tmp_path, kind, monkeypatch):
    folder = make_run(tmp_path / "run", {})
    field = HOSTILE[kind]
    rewrite(folder, pa.table([pa.array([None], field.type)], pa.schema([field])))
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=f"column '{field.name}' is .* instead of"):
        load(folder)


def test_iqm_by_hand():
    # 8 values: two are cut off at each end; mean of 3, 4, 5, 6.
    assert iqm(np.array([100, 4, 3, -100, 5, 6, -100, 100])) == 4.5
    assert iqm(np.array([1.0, 2.0, 6.0])) == 3.0
    np.testing.assert_array_equal(iqm(np.array([[0, 1, 3, 9], [0, 0, 2, 2]])), [2, 1])


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(400, 40))
    intervals = np.array([bootstrap_interval(sample, reps=400) for sample in samples])
    covered = np.mean((intervals[:, 0] < 0) & (intervals[:, 1] > 0))
    assert 0.90 < covered < 0.98


def test_the_bootstrap_interval_of_normal_values_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=2000)
    half = 1.96 * values.std() / np.sqrt(2000)
    expected = [values.mean() - half, values.mean() + half]
    assert bootstrap_interval(values, reps=5000) == pytest.approx(expected, abs=0.003)


def test_one_value_has_no_interval_and_nans_do_not_count():
    assert np.isnan(bootstrap_interval(np.array([1.0]))).all()
    values = np.array([1.0, 2.0, 4.0])
    padded = np.array([1.0, np.nan, 2.0, 4.0])
    assert bootstrap_interval(padded) == bootstrap_interval(values)


def test_every_task_counts_once_in_the_adaptation_curve(tmp_path):
    # Shot 0: task a has scores 0, 0, 0 and task b has 1; the mean over tasks is 0.5, not 0.25.
    # Shot 1: both are 1. Task c has no score, but returns.
    rows = {
        "task_id": ["a", "a", "a", "b", "a", "b", "c"],
        "adaptation_step": [0, 0, 0, 0, 1, 1, 1],
        "score": [0, 0, 0, 1, 1, 1, None],
        "return": [0, 3, 6, 1, 2, 2, 5],
    }
    curve = adaptation(load(make_run(tmp_path / "run", rows)))
    assert curve["stage"].tolist() == ["test", "test"]
    assert curve["adaptation_step"].tolist() == [0, 1]
    assert curve["score"].tolist() == [0.5, 1.0]
    assert curve["tasks"].tolist() == [2, 3]
    assert curve["return"].tolist() == [2.0, 3.0]
    assert curve[["low", "high"]].iloc[1].tolist() == [1.0, 1.0]


def test_an_empty_frame_has_an_empty_adaptation_curve(tmp_path):
    curve = adaptation(load(make_run(tmp_path / "run")), by=("run_id", "stage"))
    assert len(curve) == 0
    assert list(curve.columns[:4]) == ["run_id", "stage", "algorithm", "adaptation_step"]
