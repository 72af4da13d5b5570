"""Datasets return the recorded steps in order, independently of files and cache."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium.spaces import Box, Discrete

from dmrl_ray.data.dataset import Dataset
from dmrl_ray.data.files import Recorded
from dmrl_ray.data.sources import DataSettings, External, Minari, source_of
from dmrl_ray.errors import ConfigError
from dmrl_ray.store import compaction
from dmrl_ray.store.writer import RunWriter
from tests.jobs.test_worker import RECURRENT, make_spec
from tests.rollout.test_recording import make_record, recorded

CART = (Box(-np.inf, np.inf, (4,), np.float32), Discrete(2))
LINE = (Box(-np.inf, np.inf, (1,), np.float32), Discrete(3))
SPEC = make_record(make_spec())


def write(folder, answers, order=None, stage="seen"):
    """A run with recorded steps, in one commit for each piece given."""
    with RunWriter.create(folder, "seed: 0\n", {}) as writer:
        for i in order or range(len(answers)):
            writer.add("transitions", {**answers[i][0], "stage": stage, "job": stage})
            writer.commit({}, {})
    return folder


def opened(folder, spaces=CART, **options):
    return Dataset(Recorded((str(folder),), "seen"), *spaces, **options)


@pytest.fixture(scope="module")
def answers():
    return recorded(SPEC, iterations=6)


@pytest.fixture(scope="module")
def folder(answers, tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "run", answers)


def sampled(data, seed=0):
    rollout = data.windows(np.random.default_rng(seed), 8, 40)
    return [rollout.obs, rollout.action, rollout.reward, rollout.final_obs]


def test_parts_that_are_merged_while_they_are_read_from_are_read_on(answers, tmp_path, monkeypatch):
    folder = write(tmp_path / "run", answers)
    expected = sampled(opened(folder))
    data = opened(folder, memory_bytes=1)
    monkeypatch.setattr(compaction, "TIER", 3)
    with RunWriter.open(folder) as writer:
        for _ in range(5):  # Six parts become one, and the commits that name them are no more.
            writer.commit({}, {})
    assert len(list((folder / "transitions").iterdir())) == 1
    for before, after in zip(expected, sampled(data), strict=True):
        np.testing.assert_array_equal(after, before)


def test_parts_that_are_gone_while_they_are_read_from_are_not_taken_for_others(answers, tmp_path):
    folder = write(tmp_path / "run", answers)
    data = opened(folder, memory_bytes=1)
    with RunWriter.open(folder) as writer:
        writer.forget(["seen"])
        writer.add("transitions", {**answers[0][0], "stage": "other", "job": "other"})
        for _ in range(4):
            writer.commit({}, {})
    with pytest.raises(ValueError, match="is no longer in the run"):
        sampled(data)


def history(answers, b, field):
    """The steps of one environment over all iterations."""
    return np.concatenate([getattr(trial[0], field)[:, b] for _, trial in answers])


def test_steps_are_read_as_they_were_collected(answers, folder):
    data = opened(folder)
    starts = data.starts["history"]
    assert starts.tolist() == [0, 120, 240, 360, 480]
    whole = data.rollout([[(int(s), int(s) + 120, True)] for s in starts[:-1]], 120)
    for b in range(4):
        for field in ("action", "reward", "terminated", "truncated"):
            np.testing.assert_array_equal(
                getattr(whole, field)[:, b], history(answers, b, field), field
            )
        np.testing.assert_array_equal(
            whole.next_obs()[:, b],
            np.concatenate([trial[0].next_obs()[:, b] for _, trial in answers]),
        )
        seen = np.concatenate([trial[0].obs[:-1, b] for _, trial in answers])
        np.testing.assert_array_equal(whole.obs[:-1, b], seen)


def same(one, other):
    for name, array in vars(one).items():
        np.testing.assert_array_equal(array, getattr(other, name), name)


def draw(data, seed=0):
    rng = np.random.default_rng(seed)
    return [
        data.windows(rng, 3, 50),
        data.units(rng, "episode", 3, 40),
        data.histories(rng, 3, 60, every=2),
        data.of_tasks(rng, data.task_names[:1] * 2, 30),
    ]


def test_samples_do_not_depend_on_files_or_memory(answers, folder, tmp_path, monkeypatch):
    # Other parts, in another order, in row groups of three steps, and nothing kept in memory.
    monkeypatch.setattr("dmrl_ray.store.tables.ROW_GROUP_BYTES", 300)
    other = opened(write(tmp_path / "run", answers, [4, 1, 5, 0, 3, 2]), memory_bytes=1)
    assert sum(other._source.file(i).num_row_groups for i in range(6)) > 50
    for one, two in zip(draw(opened(folder)), draw(other), strict=True):
        same(one, two)


def test_samples_depend_on_the_random_stream_alone(folder):
    data = opened(folder)
    for one, two in zip(draw(data), draw(data), strict=True):
        same(one, two)
    assert (draw(data, 1)[0].obs != draw(data)[0].obs).any()


def test_windows_reset_memory_at_the_ends_of_episodes_and_nowhere_else(folder):
    rollout = opened(folder).windows(np.random.default_rng(0), 20, 60)
    done = rollout.terminated | rollout.truncated
    # An episode that was still open when recording ended begins another segment as well.
    assert (rollout.reset[1:] >= done[:-1]).all()
    assert rollout.reset[0].all()
    assert rollout.reset[1:].sum() < done[:-1].sum() + 20


def test_windows_sample_every_step_equally_often(folder):
    data = opened(folder)
    counts = np.zeros(data.num_steps)
    rng = np.random.default_rng(0)
    positions = {tuple(o): i for i, o in enumerate(_all_obs(data))}
    for _ in range(200):
        for o in data.windows(rng, 20, 12).obs[:-1].reshape(-1, 4):
            counts[positions[tuple(o)]] += 1
    assert counts.min() > 0.6 * counts.mean()
    assert counts.max() < 1.4 * counts.mean()


def _all_obs(data):
    return data.rollout([[(0, data.num_steps, True)]], data.num_steps).obs[:-1, 0]


def test_histories_keep_the_order_of_learning(tmp_path):
    # Every history counts its episodes in its observations.
    answers = recorded(
        make_record(
            make_spec({"type": "bandit", "arms": 5, "pulls": 10}, {"type": "rl2"}, RECURRENT)
        ),
        7,
    )
    spaces = (Box(-np.inf, np.inf, (1,), np.float32), Discrete(5))
    for i, (steps, _) in enumerate(answers):
        rows = len(steps["t"])
        counted = np.full((rows, 1), i, np.float32).tolist()
        steps["obs"] = steps["next_obs"] = pa.array(counted, pa.list_(pa.float32()))
    data = opened(write(tmp_path / "run", answers, [6, 2, 0, 1, 4, 3, 5]), spaces)
    assert len(data.starts["trial"]) == 7 * 4 + 1
    rollout = data.histories(np.random.default_rng(0), 16, 30, every=1)
    order = rollout.obs[:-1, :, 0]
    assert (np.diff(order, axis=0) >= 0).all()
    assert rollout.reset[1:].sum() == 0
    assert len(set(order[0])) > 3
    skipping = data.histories(np.random.default_rng(0), 16, 20, every=3).obs[:-1, :, 0]
    assert ((skipping[10] - skipping[9]) == 3).all()


def test_tasks_are_kept_apart(answers, folder):
    data = opened(folder)
    names = data.task_names[:3]
    rollout = data.of_tasks(np.random.default_rng(0), names, 25)
    task_of = {}
    for steps, _ in answers:
        for obs, task in zip(steps["obs"].to_pylist(), steps["task_id"].to_pylist(), strict=True):
            task_of[tuple(obs)] = task
    for b, name in enumerate(names):
        assert {task_of[tuple(o.tolist())] for o in rollout.obs[:-1, b]} == {name}


def test_the_newest_part_of_a_history_is_its_end(answers, folder):
    data = opened(folder)
    late = {tuple(o) for b in range(4) for o in _all_obs(data)[120 * b + 90 : 120 * (b + 1)]}
    found = 0
    for name in data.tasks_of(0.25):  # Others were met early alone.
        rollout = data.of_tasks(np.random.default_rng(0), [name], 10, newest=0.25)
        found += 1
        assert {tuple(o) for o in rollout.obs[:-1, 0]} <= late
    assert 0 < found < len(data.task_names)


def test_a_file_much_larger_than_the_memory_is_read_in_a_bounded_one(tmp_path):
    path, rng = tmp_path / "big.parquet", np.random.default_rng(0)
    schema = pa.schema(
        {"obs": pa.list_(pa.float32()), "action": pa.int64(), "terminated": pa.bool_()}
    )
    with pq.ParquetWriter(path, schema) as writer:
        for _ in range(40):  # 40 row groups of 2 MB
            obs = pa.ListArray.from_arrays(
                np.arange(0, 1001 * 500, 500, np.int32), rng.random(500_000, np.float32)
            )
            ends = np.arange(1000) % 10 == 9
            writer.write_table(pa.table([obs, np.zeros(1000, int), ends], schema))
    space = Box(-np.inf, np.inf, (500,), np.float32)
    data = Dataset(External((str(path),), {}), space, Discrete(2), memory_bytes=5 << 20)
    before, largest = pa.default_memory_pool().bytes_allocated(), 0
    for _ in range(3):
        data.units(rng, "episode", 32, 10)
        largest = max(largest, sum(block.size_bytes for block in data._blocks.values()))
    assert len(data._blocks) == 2
    assert largest <= 5 << 20
    assert pa.default_memory_pool().bytes_allocated() - before < 8 << 20
    assert path.stat().st_size > 60 << 20


def external(tmp_path, **columns):
    path = tmp_path / "theirs.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def test_columns_of_external_files_are_mapped_and_their_episodes_found(tmp_path):
    file = external(
        tmp_path,
        o=[[float(i)] for i in range(7)],
        a=[0, 1, 2, 0, 1, 2, 0],
        done=[False, False, True, False, False, False, True],
    )
    names = {"obs": "o", "action": "a", "terminated": "done"}
    data = Dataset(External((file,), names), *LINE)
    assert data.starts["episode"].tolist() == [0, 3, 7]
    rollout = data.rollout([[(1, 3, True), (3, 5, True)]], 4)
    assert rollout.obs[:, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert rollout.action[:, 0].tolist() == [1, 2, 0, 1]
    assert rollout.next_obs()[:, 0, 0].tolist() == [2, 2, 4, 5]
    assert not rollout.reward.any()


def test_episodes_of_external_files_may_be_numbered(tmp_path):
    file = external(tmp_path, obs=[[0.0]] * 6, action=[0] * 6, episode=[1, 1, 5, 5, 5, 9])
    assert Dataset(External((file,), {}), *LINE).starts["episode"].tolist() == [0, 2, 5, 6]


def test_episodes_of_minari_have_their_last_successor():
    episodes = [
        SimpleNamespace(
            observations=np.arange(n + 1, dtype=np.float32)[:, None] + 10 * n,
            actions=np.zeros(n, np.int64),
            rewards=np.ones(n),
            terminations=np.arange(n) == n - 1,
            truncations=np.zeros(n, bool),
        )
        for n in (2, 3)
    ]

    class Fake:
        total_episodes = 2

        def __getitem__(self, i):
            return episodes[i]

    data = Dataset(Minari(Fake(), "line"), *LINE)
    rollout = data.rollout([[(0, 2, True), (2, 5, True)]], 5)
    assert rollout.next_obs()[:, 0, 0].tolist() == [21, 22, 31, 32, 33]
    assert rollout.terminated[:, 0].tolist() == [False, True, False, False, True]
    episodes[1].rewards[2] = np.nan
    assert Dataset(Minari(Fake(), "line"), *LINE).left_out.first == (
        "data.minari: line episode 1 step 2: reward",
    )


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ValueError, match=r"pip install 'dmrl-ray\[data\]'"):
        source_of(DataSettings(minari="x/y-v0"), "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name one source"),
        ({"stage": "a", "files": "b"}, "name one source"),
        ({"files": "b", "columns": {"observation": "o"}}, "'observation' is none of obs"),
    ],
)
def test_settings_that_name_no_source_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataSettings(**settings)


def test_data_that_do_not_match_the_family_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="4 numbers"):
        opened(folder, LINE)
    with pytest.raises(ValueError, match="not in the action space of the task family"):
        opened(folder, (CART[0], Box(-1, 1, (2,), np.float32)))
    with pytest.raises(ValueError, match="no transitions were recorded"):
        Recorded((str(tmp_path),), None)
    with pytest.raises(ValueError, match="record a stage"):
        Dataset(Recorded((str(folder),), "other"), *CART)
    with pytest.raises(ValueError, match="no column 'o' for 'obs'"):
        External((external(tmp_path, obs=[[0.0]], action=[0]),), {"obs": "o"})


ROWS = {
    "obs": [[float(i)] for i in range(9)],
    "action": [i % 3 for i in range(9)],
    "reward": [1.0] * 9,
    "truncated": [i % 3 == 2 for i in range(9)],
    "next_obs": [[float(i + 1)] if i % 3 == 2 else None for i in range(9)],
}


def holed(tmp_path, **changes):
    """Three episodes of three steps, observed as 0, 1, 2, ..., with some cells changed."""
    columns = {name: list(cells) for name, cells in ROWS.items()}
    for name, cells in changes.items():
        for row, value in cells.items():
            columns[name][row] = value
    return Dataset(External((external(tmp_path, **columns),), {}), *LINE)


def seen(rollout):
    """The observations that are acted on, in all columns."""
    return {float(x) for x in rollout.obs[:-1].flatten()}


def all_finite(rollout):
    arrays = (rollout.obs, rollout.reward, rollout.final_obs, rollout.next_obs())
    return all(np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize(
    ("column", "row", "value", "left"),
    [
        ("obs", 4, [np.nan], {0, 1, 2, 5, 6, 7, 8}),  # 3 leads there
        ("obs", 4, None, {0, 1, 2, 5, 6, 7, 8}),
        ("obs", 3, [np.inf], {0, 1, 2, 4, 5, 6, 7, 8}),  # begins an episode
        ("obs", 4, [1e300], {0, 1, 2, 5, 6, 7, 8}),  # float32 cannot hold it
        ("next_obs", 5, [-np.inf], {0, 1, 2, 3, 4, 6, 7, 8}),
        ("reward", 4, np.nan, {0, 1, 2, 3, 5, 6, 7, 8}),
        ("reward", 4, None, {0, 1, 2, 3, 5, 6, 7, 8}),
        ("action", 4, None, {0, 1, 2, 3, 5, 6, 7, 8}),
        ("truncated", 4, None, {0, 1, 2, 3, 5, 6, 7, 8}),
    ],
)
def test_non_finite_steps_are_not_sampled_and_nothing_is_joined_over_them(
    tmp_path, column, row, value, left
):
    data = holed(tmp_path, **{column: {row: value}})
    rng = np.random.default_rng(0)
    for rollout in (data.windows(rng, 50, 6), data.of_tasks(rng, data.task_names * 50, 6)):
        assert seen(rollout) == left
        assert all_finite(rollout)
        joined = ~rollout.reset[1:]
        assert (np.diff(rollout.obs[:-1, :, 0], axis=0)[joined] == 1).all()
    for rollout in (data.units(rng, "episode", 50, 6), data.histories(rng, 50, 6, every=1)):
        assert seen(rollout) == {0, 1, 2, 6, 7, 8}
        assert all_finite(rollout)
    assert data.left_out.rows == 1
    assert data.left_out.of == 9
    place = f"{tmp_path}/theirs.parquet row {row}: {column}"
    assert data.left_out.first == (place,)


def test_a_trial_with_a_gap_is_left_out_as_a_whole(tmp_path):
    columns = {**ROWS, "trial": [0] * 6 + [1] * 3, "reward": [1.0, np.nan, *[1.0] * 7]}
    data = Dataset(External((external(tmp_path, **columns),), {}), *LINE)
    assert seen(data.units(np.random.default_rng(0), "trial", 20, 5)) == {6, 7, 8}


def test_the_first_rows_that_are_left_out_are_named_and_the_others_counted(tmp_path):
    data = holed(tmp_path, obs={1: [np.nan], 8: [np.nan]}, reward=dict.fromkeys((1, 3, 7), np.nan))
    first = ("theirs.parquet row 1: obs, reward", "theirs.parquet row 3: reward")
    assert str(data.left_out).startswith("4 of 9 rows hold non-finite numbers: ")
    assert all(place in str(data.left_out) for place in first)
    assert str(data.left_out).endswith("row 7: reward and 1 more")


def test_recorded_rows_are_named_with_their_stage_and_environment(answers, tmp_path):
    steps, trial = answers[0]
    broken = {**steps, "reward": np.where(np.arange(len(steps["t"])) == 25, np.nan, 1.0)}
    data = opened(write(tmp_path / "run", [(broken, trial), *answers[1:]]))
    (place,) = data.left_out.first
    known = r"\(stage seen, job seen, environment 5, trial 0, episode 0, t 5\): reward$"
    assert re.search(r"run/\S+\.parquet row 25 " + known, place)
    assert data.left_out.of == 480


def test_data_without_any_finite_row_are_refused_by_name(tmp_path):
    rng = np.random.default_rng(0)
    data = holed(tmp_path, reward=dict.fromkeys(range(9), np.nan))
    with pytest.raises(ConfigError, match=r"data: nothing is left .* 9 of 9 rows .*theirs.parquet"):
        data.windows(rng, 1, 1)
    data = holed(tmp_path, reward=dict.fromkeys((0, 4, 8), np.nan))
    with pytest.raises(
        ConfigError, match=r"data: no episode is complete.* 3 of 9 .*theirs.parquet"
    ):
        data.units(rng, "episode", 1, 1)


def test_rows_left_out_depend_neither_on_memory_nor_on_earlier_samples(tmp_path):
    data = holed(tmp_path, obs={4: [np.nan]})
    other = Dataset(data._source, *LINE, memory_bytes=1)
    for one, two in zip(draw(data), draw(data), strict=True):
        same(one, two)
    for one, two in zip(draw(data, 3), draw(other, 3), strict=True):
        same(one, two)
