"""Exports from here are read by RLlib, and recordings of RLlib are read here."""

import gc
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import play
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray
from ray.data._internal.tensor_extensions.arrow import ArrowTensorArray
from ray.rllib.algorithms.bc import BCConfig
from ray.rllib.algorithms.cql import CQLConfig
from ray.rllib.algorithms.iql import IQLConfig
from ray.rllib.algorithms.marwil import MARWILConfig
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.offline.offline_prelearner import OfflinePreLearner
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils import unflatten_dict

import dmrl_ray
from dmrl_ray.config.components import Component
from dmrl_ray.data.dataset import Dataset
from dmrl_ray.data.sources import DataSettings, source_of
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.spec import load_family
from dmrl_ray.rllib import register
from dmrl_ray.rllib.data import export_steps
from dmrl_ray.store import tables

MLP = "{type: mlp, hidden_sizes: [16]}"
PLAYED = "  played: {type: evaluate, init_from: meta, tasks: 16, record: true, greedy: false}"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """By family: the run folder, and what was played in it as RLlib reads it."""
    made = {}

    def of(family, steps=20):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            algorithm = f"{{type: ppo, num_steps: {steps}}}"
            run = play(folder / "run", family, MLP, algorithm, PLAYED)
            made[family] = run, folder / "steps", export_steps(run, folder / "steps")
        return made[family]

    return of


def envs_of(folder):
    """What RLlib's reader is handed: arrays of many rows."""
    frame = pq.read_table(folder)
    rows = zip(frame.column_names, frame.columns, strict=True)
    return {n: np.stack(list(c.to_numpy())) if n.endswith("obs") else c.to_numpy() for n, c in rows}


def test_rllibs_cloning_learns_from_recorded_steps(tmp_path):
    played = PLAYED.replace("greedy: false", "greedy: true")
    run = play(tmp_path / "run", "cartpole", MLP, "{type: ppo, num_steps: 20}", played)
    export_steps(run, tmp_path / "steps")
    family = load_family(Component(type="cartpole"))
    spaces = (family.observation_space, family.action_space)
    config = BCConfig().environment(observation_space=spaces[0], action_space=spaces[1])
    config.training(lr=1e-2).debugging(seed=0)
    learner = config.build_learner()
    module = config.get_multi_rl_module_spec()
    reader = OfflinePreLearner(config=config, spaces=spaces, module_spec=module)
    batch = unflatten_dict(reader(envs_of(tmp_path / "steps")))
    steps = MultiAgentBatch({"default_policy": SampleBatch(batch["default_policy"])}, env_steps=1)
    losses = [
        learner.update(training_data=TrainingData(batch=steps))["default_policy"]["total_loss"]
        for _ in range(20)
    ]
    assert float(losses[0]) == pytest.approx(np.log(2), abs=0.1)
    assert float(losses[-1]) < 0.9 * float(losses[0])


@pytest.mark.slow
@pytest.mark.parametrize("config", [BCConfig, MARWILConfig, CQLConfig, IQLConfig])
def test_rllibs_offline_algorithms_train_on_recorded_steps(config, recorded, ray_instance):
    _, folder, _ = recorded("point_goal")
    register("recorded", "point_goal")
    algorithm = (
        config()
        .environment("recorded")
        .offline_data(
            input_=[str(folder)],
            dataset_num_iters_per_learner=8,
            map_batches_kwargs={"concurrency": 1},
        )
        .evaluation(evaluation_interval=None)
        .training(train_batch_size_per_learner=128)
        .debugging(seed=0, log_level="ERROR")
    )
    # The last two have a step size for each of their parts.
    algorithm.training(lr=None if config in (CQLConfig, IQLConfig) else 1e-2)
    family = load_family(Component(type="point_goal"))
    algorithm.environment(
        observation_space=family.observation_space, action_space=family.action_space
    )
    trained = algorithm.build_algo()
    losses = [trained.train()["learners"]["default_policy"]["total_loss"] for _ in range(3)]
    trained.stop()
    del trained
    gc.collect()  # Ray's data library says goodbye while Ray is there.
    assert np.isfinite(losses).all()


def test_every_step_is_there_once_with_its_true_successor(tmp_path, monkeypatch):
    # Training goes on with open episodes, over several commits, and blocks are small.
    monkeypatch.setattr(tables, "ROW_GROUP_BYTES", 4000)
    more = (
        "  more: {type: pretrain, env_steps: 3k, record: true, validation_tasks: 2}\n"
        "commit: {every_updates: 2}"
    )
    run = play(tmp_path / "run", "cartpole", MLP, "{type: ppo, num_steps: 32}", more)
    steps = export_steps(run, tmp_path / "steps")
    frame = pq.read_table(tmp_path / "steps").to_pandas()
    assert len(frame) == steps == 6 * 32 * 16
    assert len(list((run / "transitions").iterdir())) > 1
    assert len(list((tmp_path / "steps").iterdir())) > 10
    returns = []
    for _, episode in frame.groupby("eps_id", sort=False):
        obs, new_obs = np.stack(episode["obs"]), np.stack(episode["new_obs"])
        np.testing.assert_array_equal(new_obs[:-1], obs[1:])
        over = (episode["terminateds"] | episode["truncateds"]).to_numpy()
        assert not over[:-1].any()
        if over[-1]:
            assert (np.abs(new_obs[-1][[0, 2]]) > [2.4, 0.2094]).any() or len(episode) == 500
            returns.append(episode["rewards"].sum())
    rows = dmrl_ray.load(run)
    rows = rows[(rows["stage"] == "more") & (rows["split"] == "train")]
    assert sorted(returns) == sorted(rows["return"])


def steps_of(source, family):
    """All episodes of a source, whole and in order."""
    spaces = load_family(Component(type=family))
    dataset = Dataset(source, spaces.observation_space, spaces.action_space)
    starts = dataset.starts["episode"]
    return [dataset.rollout([[(int(a), int(b), True)]], int(b - a)) for a, b in pairwise(starts)]


def test_exported_steps_are_read_back(recorded):
    run, folder, steps = recorded("point_goal")
    ours = steps_of(source_of(DataSettings(runs=(str(run),)), ""), "point_goal")
    back = steps_of(source_of(DataSettings(rllib=(str(folder),)), ""), "point_goal")
    assert sum(r.reward.size for r in back) == steps
    assert len(ours) == len(back) == 16

    def order(rollout):
        return rollout.reward.tolist()

    for a, b in zip(sorted(ours, key=order), sorted(back, key=order), strict=True):
        np.testing.assert_array_equal(a.obs, b.obs)
        np.testing.assert_array_equal(a.action.clip(-1, 1), b.action)
        np.testing.assert_array_equal(a.reward, b.reward)
        np.testing.assert_array_equal(a.truncated, b.truncated)


def test_a_stage_learns_from_recordings_of_rllib(recorded, tmp_path):
    _, folder, _ = recorded("point_goal")
    run = play(
        tmp_path / "run",
        "point_goal",
        MLP,
        f"{{type: behavior_cloning, data: {{rllib: {folder}}}}}",
    )
    metrics = dmrl_ray.load(run, table="metrics")
    assert np.isfinite(metrics[metrics["name"] == "loss"]["value"]).all()


def table(**columns):
    """Three steps as RLlib records them."""
    flags = {"terminateds": [False, False, True], "truncateds": [False] * 3}
    obs = ArrowTensorArray.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))
    return pa.table(
        {"eps_id": ["a"] * 3, "obs": obs, "actions": [0, 1, 0], "rewards": [1.0, 2.0, 3.0]}
        | {"new_obs": obs, **flags, **columns}
    )


READ = """
import sys
from dmrl_ray.data.sources import DataSettings, source_of
block = source_of(DataSettings(rllib=(sys.argv[1],)), "").read(0)
assert "ray" not in sys.modules
print(block.obs.tolist(), block.reward.tolist())
"""


def test_tensors_of_ray_are_read_where_they_are_known_and_where_not(tmp_path):
    path = tmp_path / "steps.parquet"
    pq.write_table(table(), path)
    obs = np.arange(12).reshape(3, 4)
    block = source_of(DataSettings(rllib=(str(path),)), "").read(0)
    np.testing.assert_array_equal(block.obs, obs)
    np.testing.assert_array_equal(block.next_obs, obs)
    command = [sys.executable, "-c", READ, str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout == f"{obs.astype(float).tolist()} [1.0, 2.0, 3.0]\n"


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


def test_types_that_would_run_code_are_refused_unread(tmp_path):
    path = tmp_path / "steps.parquet"
    pq.write_table(table(obs=ArrowPythonObjectArray.from_objects([Bomb()] * 3)), path)
    with pytest.raises(ValueError, match=r"'obs' is .*, which is not plain"):
        source_of(DataSettings(rllib=(str(path),)), "")


def test_compressed_observations_are_refused_with_the_way_out(tmp_path):
    path = tmp_path / "steps.parquet"
    pq.write_table(table(obs=["BCJNGGhA"] * 3), path)
    with pytest.raises(ValueError, match=r"steps.parquet: .* output_compress_columns=\[\]"):
        source_of(DataSettings(rllib=(str(path),)), "")


def test_an_export_that_fails_is_one_sentence(recorded, tmp_path):
    run, folder, _ = recorded("point_goal")
    with pytest.raises(ConfigError, match="exists already"):
        export_steps(run, folder)
    with pytest.raises(ConfigError, match="'meta' was not recorded; recorded stages: played"):
        export_steps(run, tmp_path / "steps", stage="meta")
    assert not (tmp_path / "steps").exists()
