"""RLlib where Ray has other processes: its own samplers, our workers, Tune's trials."""

import pytest

import dmrl_ray
from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display
from dmrl_ray.rllib import register
from dmrl_ray.store.commit_records import verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_instance")]

TEXT = """
tasks: {type: point_goal, horizon: 5}
algorithm:
  type: rllib:PPO
  num_envs_per_env_runner: 10
  train_batch_size_per_learner: 200
  minibatch_size: 100
  num_epochs: 2
  model: {fcnet_hiddens: [8]}
workers: {num: 2}
stages:
  multi: {type: pretrain, env_steps: 400, validation_tasks: 4}
  tuned: {type: finetune, init_from: multi, tasks: 3, updates: 1}
  held_out: {type: evaluate, init_from: multi, tasks: 4}
"""


def test_a_run_with_workers_samples_fine_tunes_and_plays_in_them(tmp_path):
    folder = controller.run(
        parse_config(TEXT, "test.yaml"), tmp_path / "run", display=Display(quiet=True)
    )
    episodes = dmrl_ray.load(folder)
    training = episodes[(episodes["stage"] == "multi") & (episodes["split"] == "train")]
    assert len(training) * 5 >= 400
    assert training["task_id"].is_unique  # Two samplers never share a stream.
    tuned = episodes[episodes["stage"] == "tuned"]
    assert tuned.groupby(["job", "adaptation_step"]).size().tolist() == [40] * 6
    assert len(episodes[episodes["stage"] == "held_out"]) == 4
    assert verify(folder) == []


def test_tune_trains_on_a_registered_family(tmp_path):
    from ray import tune
    from ray.rllib.algorithms.ppo import PPO, PPOConfig

    register("tuned_bandits", {"type": "bandit", "pulls": 4})
    config = (
        PPOConfig()
        .environment("tuned_bandits", env_config={"split": "validation"})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
        .training(lr=tune.grid_search([1e-3, 1e-2]), train_batch_size_per_learner=64)
        .training(minibatch_size=32, num_epochs=1)
    )
    run = tune.RunConfig(stop={"training_iteration": 2}, storage_path=str(tmp_path), verbose=0)
    results = tune.Tuner(PPO, param_space=config, run_config=run).fit()
    assert len(results) == 2
    for result in results:
        assert result.error is None
        assert result.metrics["env_runners"]["episode_len_mean"] == 4
