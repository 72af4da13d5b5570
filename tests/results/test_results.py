"""Reading results: every committed row of every run once, damage named, figures by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dmrl_ray
from dmrl_ray.results.intervals import policy_interval, t_interval
from dmrl_ray.results.reading import SUMMARY, adaptation, load, over_experience, paired, starts
from dmrl_ray.store.commit_records import Commit
from dmrl_ray.store.files import FileRecord
from dmrl_ray.store.tables import SCHEMAS
from dmrl_ray.store.writer import RunWriter

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ((ROOT / name).read_text() for name in ("docs/results.md", "README.md"))

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
    "greedy": False,
}


def make_run(folder, *chunks):
    """A run with one commit per chunk of episodes."""
    with RunWriter.create(folder, "", {}) as writer:
        for chunk in chunks:
            writer.add("episodes", {**EPISODE, **chunk})
            writer.commit({}, {})
    return folder


def run_id(folder):
    return json.loads((folder / "run.json").read_text())["run_id"]


def part(folder):
    (path,) = (folder / "episodes").iterdir()
    return path


def rewrite(folder, table):
    """Replace a run's only part by another table, as if it had been committed."""
    part(folder).unlink()
    path = folder / "episodes" / "part-x.parquet"
    pq.write_table(table, path)
    record = folder / "commits" / "00000001.json"
    written = FileRecord.of(f"episodes/{path.name}", path.read_bytes())
    record.write_bytes(replace(Commit.read(record), parts=[written]).to_bytes())


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
    assert frame["run_id"].tolist() == [run_id(tmp_path / "run")] * 3
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
    names = {run_id(make_run(tmp_path / name, {})): name for name in ("a1", "a2", "b")}
    (tmp_path / "not a run").mkdir()

    def found(path):
        return [names[run] for run in dmrl_ray.load(path)["run_id"]]

    assert found(tmp_path / "a1") == ["a1"]
    assert found(tmp_path) == ["a1", "a2", "b"]
    assert found(f"{tmp_path}/a*") == ["a1", "a2"]
    assert found([tmp_path / "b", f"{tmp_path}/*"]) == ["b", "a1", "a2"]


def test_a_path_that_exists_is_no_pattern(tmp_path):
    plain, bracketed = (make_run(tmp_path / name / "a", {}) for name in ("s1", "s[1]"))
    assert load(bracketed)["run_id"].tolist() == [run_id(bracketed)]
    assert load(f"{tmp_path}/s[1]")["run_id"].tolist() == [run_id(bracketed)]
    assert load(f"{tmp_path}/s[12]/a")["run_id"].tolist() == [run_id(plain)]


def test_a_run_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    make_run(tmp_path / "run", {})
    monkeypatch.chdir(tmp_path)
    assert len(load(["run", tmp_path / "run", f"{tmp_path}/../{tmp_path.name}/run"])) == 1


def test_runs_whose_folders_have_one_name_stay_two(tmp_path):
    runs = [make_run(tmp_path / study / "seed0", {}, {}) for study in ("a", "b")]
    frame = load(runs)
    assert frame["run_id"].tolist() == [run_id(run) for run in runs for _ in range(2)]
    assert frame["run_id"].nunique() == 2


def test_nothing_found_is_one_sentence_with_a_suggestion(tmp_path):
    make_run(tmp_path / "point_goal-1", {})
    with pytest.raises(ValueError, match=r"no run found; did you mean .*point_goal-1"):
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
    data = path.read_bytes()
    returns = SCHEMAS["episodes"].names.index("return")
    column = pq.ParquetFile(path).metadata.row_group(0).column(returns)
    end = column.dictionary_page_offset + column.total_compressed_size
    for bit in range(8 * (end - 16), 8 * end):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(OSError, match="CRC checksum"):
            pq.ParquetFile(path, page_checksum_verification=True).read()


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
    found = f"column '{field.name}' is .* instead of"
    with pytest.raises(ValueError, match="an extension type" if "ext" in kind else found):
        load(folder)


def episodes(*rows, **same):
    """Episodes by hand: task, seed, adaptation step, return, and the same cells in all."""
    names = ("task_id", "seed", "adaptation_step", "return")
    frame = pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows])
    cells = {"stage": "test", "algorithm": "maml", "score": np.nan, "success": None} | same
    frame = frame.assign(**cells)
    return frame.assign(success=frame["success"].astype("boolean"))


def test_every_task_counts_once_in_the_adaptation_curve():
    # Step 0: task a has returns 0, 0, 0 and task b has 1; the mean over tasks is 0.5, not 0.25.
    rows = [("a", 0, 0, 0.0)] * 3 + [("b", 0, 0, 1.0), ("a", 0, 1, 3.0), ("b", 0, 1, 5.0)]
    curve = adaptation(episodes(*rows).assign(episode=[0, 1, 2, 0, 3, 3]))
    assert curve["adaptation_step"].tolist() == [0, 1]
    assert curve["mean"].tolist() == [0.5, 4.0]
    assert curve["tasks"].tolist() == [2, 2]


def test_a_task_counts_as_often_as_it_was_sampled():
    # Task a was drawn three times and b once, each for two copies that play side by side.
    frame = episodes(*[("a", 0, 0, 0.0)] * 6, *[("b", 0, 0, 1.0)] * 2)
    (row,) = adaptation(frame).to_dict("records")
    assert (row["mean"], row["tasks"], row["starts"]) == (0.25, 2, 4)
    assert starts(frame).tolist() == [0, 0, 1, 1, 2, 2, 0, 0]


def test_the_mean_of_unequal_draws_is_that_of_the_family():
    # Task 0 has probability 0.8 and return 0, the 30 others share 0.2 and return 1.
    rng = np.random.default_rng(0)
    drawn = np.where(rng.random(2000) < 0.8, 0, rng.integers(1, 31, 2000))
    frame = episodes(*((str(t), 0, 0, float(t > 0)) for t in drawn))
    (row,) = adaptation(frame).to_dict("records")
    assert row["policy_low"] < 0.2 < row["policy_high"]
    assert row["policy_high"] - row["policy_low"] < 0.05
    assert row["starts"] == 2000


def test_parallel_copies_are_one_start_unless_experience_distinguishes_them():
    # Two episodes each: copies share what came before the second, an agent that is alone does not.
    rows = [(task, 0, e, 1.0) for task in "ab" for e in (0, 1) for _ in range(4)]
    frame = episodes(*rows)
    own = frame["adaptation_step"]
    copies = frame.assign(episode=own, experience_episodes=4 * own)
    assert set(starts(copies)) == {0}
    assert set(starts(copies.assign(experience_episodes=own))) == {0, 1, 2, 3}


def test_experience_does_not_cut_copies_into_starts():
    # Copies end at different times: of the same experience, tasks have one episode or two.
    rows = [(task, 0, 0, 1.0) for task in "abcd" for _ in range(4)]
    frame = episodes(*rows).assign(
        episode=[0, 0, 1, 1] * 4,
        greedy=True,
        experience_steps=0,
        experience_episodes=[0, 0, 1, 2, 0, 0, 2, 2, 0, 0, 1, 1, 0, 0, 1, 2],
    )
    assert (over_experience(frame)["starts"] == over_experience(frame)["tasks"]).all()


def stream(job, change, value):
    rows = [(f"t{n % 2}", 0, step, value) for n in range(4) for step in range(2)]
    numbers = [n for n in range(4) for _ in range(2)]
    return episodes(*rows, stage="stream", job=job, split="test").assign(
        trial=numbers,
        change=change,
        episode=[0, 1] * 4,
        experience_episodes=[0, 1] * 4,
        experience_steps=[0, 9] * 4,
        greedy=True,
    )


def test_agents_of_a_stream_changes_and_splits_are_never_mixed():
    parts = [stream("stream", k, 1.0 + k) for k in (0, 1)]
    parts += [stream("stream.restarted", 0, 3.0)]
    tuned = [stream(f"f.{i}", None, 4.0).assign(stage="tuned") for i in range(2)]
    parts += [*tuned, tuned[0].assign(split="validation", **{"return": 6.0})]
    frame = pd.concat(parts, ignore_index=True)
    for curve in (adaptation(frame, by=()), over_experience(frame, by=())):
        assert sorted(set(curve["mean"])) == [1, 2, 3, 4, 6]
        assert len(curve) == 2 * 5  # Jobs of fine-tuning are tasks, not agents.
        assert (curve.loc[curve["change"].notna(), "starts"] == 4).all()


def test_every_seed_counts_once_whatever_its_number_of_tasks():
    rows = [("a", 0, 0, 2.0)] + [(task, 1, 0, 4.0) for task in "bcd"]
    (row,) = adaptation(episodes(*rows)).to_dict("records")
    assert row["by_seed"] == [2.0, 4.0]
    assert row["mean"] == 3.0
    assert (row["seeds"], row["tasks"]) == (2, 1)


def test_tasks_of_several_seeds_are_not_taken_for_independent():
    # Seeds differ by 10, tasks by hardly anything: the interval is that of three values.
    rng = np.random.default_rng(0)
    rows = [(f"{s}-{t}", s, 0, 10.0 * s + rng.normal()) for s in range(3) for t in range(64)]
    (row,) = adaptation(episodes(*rows)).to_dict("records")
    assert (row["low"], row["high"]) == pytest.approx(t_interval(np.array(row["by_seed"])))
    assert row["policy_high"] - row["policy_low"] < 1
    assert row["seeds"] == 3


def test_one_policy_has_an_interval_over_tasks_and_none_over_seeds():
    values = np.arange(16.0)
    (row,) = adaptation(episodes(*((str(v), 0, 0, v) for v in values))).to_dict("records")
    assert (row["policy_low"], row["policy_high"]) == policy_interval(values)
    assert np.isnan([row["low"], row["high"]]).all()


def test_measures_stand_below_each_other_where_they_are_known():
    rows = [(str(task), 0, 0, float(task)) for task in range(8)]
    assert adaptation(episodes(*rows))["measure"].tolist() == ["return"]
    frame = episodes(*rows, score=0.5, success=True)
    known = adaptation(frame).set_index("measure")
    assert known["mean"].to_dict() == {"return": 3.5, "score": 0.5, "success": 1.0}
    assert known.loc["success", "policy_low"] == pytest.approx(0.025 ** (1 / 8))


def test_an_empty_frame_has_an_empty_adaptation_curve(tmp_path):
    curve = adaptation(load(make_run(tmp_path / "run")), by=("run_id", "stage"))
    assert len(curve) == 0
    keys = ["run_id", "stage", "split", "algorithm", "adaptation_step", "measure"]
    assert list(curve.columns[:6]) == keys


def on_one_axis():
    """MAML: 20 episodes of 10 steps side by side before each step; RL2: one after the other."""
    experience = {"experience_episodes": [0, 20, 0, 1, 2], "experience_steps": [0, 200, 0, 10, 20]}
    rows = [("a", 0, 0, 1.0), ("a", 0, 1, 5.0), *(("a", 0, k, 2.0 + k) for k in range(3))]
    methods = {"algorithm": ["maml"] * 2 + ["rl2"] * 3, "greedy": [False] * 2 + [True] * 3}
    return episodes(*rows).assign(**experience, **methods)


def test_methods_stand_on_one_axis_of_experience():
    curve = over_experience(on_one_axis())
    maml, rl2 = (curve[curve["algorithm"] == name] for name in ("maml", "rl2"))
    assert maml["experience_episodes"].tolist() == [0, 20]
    assert maml["mean"].tolist() == [1, 5]
    assert rl2["experience_episodes"].tolist() == [0, 1, 2]
    assert rl2["mean"].tolist() == [2, 3, 4]
    assert curve["experience_steps"].tolist() == [0, 200, 0, 10, 20]
    assert curve["greedy"].tolist() == [False, False, True, True, True]


def test_steps_are_an_axis_too():
    curve = over_experience(on_one_axis(), "experience_steps")
    assert curve["experience_steps"].tolist() == [0, 200, 0, 10, 20]
    assert curve["experience_episodes"].tolist() == [0, 20, 0, 1, 2]
    with pytest.raises(ValueError, match="'return' is not one of experience_episodes"):
        over_experience(on_one_axis(), "return")
    with pytest.raises(ValueError, match="points: must be at least 2"):
        over_experience(on_one_axis(), points=1)
    assert over_experience(on_one_axis(), by=("algorithm",)).columns.is_unique


def test_many_amounts_of_experience_are_joined_and_none_stays_alone():
    # Lengths vary: hardly two episodes have the same number of steps before them.
    rng = np.random.default_rng(0)
    steps = np.append(0, np.unique(rng.integers(1, 1000, 200)))
    rows = [("a", 0, 0, float(x)) for x in steps]
    frame = episodes(*rows).assign(experience_steps=steps, experience_episodes=0, greedy=True)
    curve = over_experience(frame, "experience_steps", points=5)
    assert len(curve) == 5
    assert curve[["experience_steps", "to"]].iloc[0].tolist() == [0, 0]
    for _, point in curve.iterrows():
        inside = steps[(steps >= point["experience_steps"]) & (steps <= point["to"])]
        assert point["mean"] == pytest.approx(inside.mean())
    assert curve["to"].iloc[-1] == steps.max()
    assert (curve["to"].to_numpy()[:-1] < curve["experience_steps"].to_numpy()[1:]).all()


def test_episodes_of_unknown_experience_are_a_point_of_their_own():
    frame = on_one_axis()
    frame.loc[frame["algorithm"] == "maml", ["experience_episodes", "experience_steps"]] = np.nan
    maml = over_experience(frame).query("algorithm == 'maml'")
    assert maml["mean"].tolist() == [3.0]
    assert maml["experience_episodes"].isna().all()


def two_methods(tasks=16):
    """Tasks differ by 10, seeds by 1, and rl2 is 2 better than maml on every task."""
    rng = np.random.default_rng(0)
    hard = 10 * rng.normal(size=tasks)
    rows = [
        (str(t), s, 0, hard[t] + s + 0.1 * rng.normal()) for s in range(5) for t in range(tasks)
    ]
    maml, rl2 = episodes(*rows, change=None), episodes(*rows, algorithm="rl2", change=None)
    better = 2 + 0.01 * rng.normal(size=len(rows))
    return pd.concat([maml, rl2.assign(**{"return": rl2["return"] + better})])


def test_variance_common_to_both_leaves_a_paired_difference():
    (row,) = paired(two_methods(), "rl2", "maml").to_dict("records")
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((2, 2, 2), abs=0.01)
    assert row["by_seed"] == pytest.approx([2] * 5, abs=0.01)
    assert (row["seeds"], row["tasks"]) == (5, 16)
    alone = adaptation(two_methods())
    assert (alone["high"] - alone["low"] > 2).all()


def test_only_shared_tasks_are_paired():
    frame = two_methods()
    lacking = (frame["algorithm"] == "rl2") & ((frame["seed"] == 4) | (frame["task_id"] == "3"))
    (row,) = paired(frame[~lacking], "rl2", "maml").to_dict("records")
    assert (row["seeds"], row["tasks"]) == (4, 15)
    assert row["mean"] == pytest.approx(2, abs=0.01)


def test_one_task_of_64_does_not_make_a_policy_better():
    rows = [(str(t), 0, 0, 0.0) for t in range(64)]
    won = episodes(*rows, algorithm="rl2", success=True)
    frame = pd.concat([won, won.assign(algorithm="maml", success=won["task_id"] != "7")])
    frame["success"] = frame["success"].astype("boolean")
    found = paired(frame, "rl2", "maml").set_index("measure")
    assert found.loc["success", "mean"] == 1 / 64
    assert found.loc["success", "policy_low"] < 0 < found.loc["success", "policy_high"]
    assert np.isnan(found.loc["return", ["policy_low", "policy_high"]].tolist()).all()
    paid = frame.assign(**{"return": frame["success"].astype(float)})
    found = paired(paid, "rl2", "maml").set_index("measure")
    assert found.loc["return", "policy_low"] < 0 < found.loc["return", "policy_high"]


def test_methods_without_shared_tasks_are_refused():
    frame = two_methods()
    with pytest.raises(ValueError, match="algorithm: no episode of 'ppo'; there are 'maml', 'rl2'"):
        paired(frame, "rl2", "ppo")
    other = frame.assign(task_id=frame["algorithm"] + frame["task_id"])
    with pytest.raises(ValueError, match="'rl2' and 'maml' share no task_id"):
        paired(other, "rl2", "maml")
    crossed = (frame["algorithm"] == "rl2") == (
        frame["seed"] % 2 == frame["task_id"].astype(int) % 2
    )
    with pytest.raises(ValueError, match="'rl2' and 'maml' share no task within a seed"):
        paired(frame[crossed], "rl2", "maml")


@pytest.mark.parametrize(
    ("values", "known"),
    [(["x", None], "'x'"), ([True, False], "False, True"), ([1.0, np.nan], "1.0")],
)
def test_values_that_can_be_paired_are_listed_plainly(values, known):
    frame = two_methods().assign(kind=values * 80)
    with pytest.raises(ValueError, match=f"no episode of 'b'; there are {known}$"):
        paired(frame, "x" if "x" in values else values[0], "b", by="kind")


def test_the_page_on_results_runs(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "runs" / "a", {})
    monkeypatch.chdir(tmp_path)
    first, *blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    names = {}
    exec(first, names)
    assert len(names["episodes"]) == 1
    (recipe,) = [
        b for b in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if "adaptation(" in b
    ]
    frame = two_methods().assign(experience_episodes=2, experience_steps=20, greedy=True)
    frame = frame.assign(split="test", job="held_out")
    # None of these is a result of the agent on held-out tasks.
    wrong = {"return": 1e6}
    streams = [
        frame.assign(stage="s", job=f"s{x}", change=1, trial=0, **wrong) for x in ("", ".unadapted")
    ]
    mixed = pd.concat([frame, *streams, frame.assign(split="train", **wrong)], ignore_index=True)
    for block in [*blocks, recipe.replace('dmrl_ray.load("runs/*")', "mixed")]:
        found = {}
        for rows in (frame, mixed):
            names = {"episodes": rows, "mixed": rows}
            exec(block, names)
            found[len(rows)] = capsys.readouterr().out
        assert len(set(found.values())) == 1
        assert re.search("experience_episodes|measure", found[len(frame)])


def test_the_page_on_results_explains_every_column():
    explained = set(re.findall(r"`(\w+)`", PAGE))
    assert explained >= {*SCHEMAS["episodes"].names, *SUMMARY, "measure"}
