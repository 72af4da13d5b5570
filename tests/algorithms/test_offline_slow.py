"""What is learned from recorded steps is good, on the shipped configs."""

from pathlib import Path

import pytest

from dmrl_ray.config.loading import load_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ALONE = ["workers.num=0", "learners.threads=1"]


def play(name, folder, *settings):
    config = load_config(CONFIGS / f"{name}.yaml", [*ALONE, *settings])
    controller.run(config, folder, display=Display(quiet=True))
    return load(folder)


def test_clones_and_gail_hold_the_pole_as_their_teacher_does(tmp_path):
    episodes = play("cartpole_cloning", tmp_path / "run", "stages.imitated.env_steps=600k")
    mean = episodes.groupby("stage")["return"].mean()
    assert mean["expert_held_out"] > 450
    assert mean["cloned_held_out"] > 0.95 * mean["expert_held_out"]
    assert mean["imitated_held_out"] > 400


def test_a_distilled_learner_improves_over_episodes_without_gradients(tmp_path):
    learner = ["stages.histories.tasks=16", "stages.histories.updates=15"]
    model = [
        "stages.distilled.network.encoder.hidden_size=64",
        "stages.distilled.algorithm.every=12",
    ]
    model += ["stages.distilled.algorithm.lr=4e-3", "stages.distilled.env_steps=600k"]
    episodes = play("grid_nav_histories", tmp_path / "run", *learner, *model)
    held_out = episodes[episodes["stage"] == "held_out"].groupby("episode")["return"].mean()
    assert held_out[3] > held_out[0] + 1
    histories = (
        episodes[episodes["stage"] == "histories"].groupby("adaptation_step")["return"].mean()
    )
    assert held_out[3] > histories[0] + 2


def test_a_decision_pretrained_model_comes_near_thompson_sampling(tmp_path):
    less = ["stages.pretrained.env_steps=520k", "stages.held_out.tasks=2048"]
    episodes = play("bandit_dpt", tmp_path / "run", *less)
    # Uniformly random pulls earn 50, and Thompson sampling 75.1.
    assert episodes.loc[episodes["stage"] == "held_out", "return"].mean() > 72
