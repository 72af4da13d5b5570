"""What RL^2 learns of the bandits of Wang et al., and that it learns it from rewards."""

from pathlib import Path

import pytest

from dmrl_ray.config.loading import load_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load

CONFIG = Path(__file__).resolve().parent.parent / "configs/wang_correlated_easy.yaml"
STEPS = ["stages.meta_trained.env_steps=100k"]
SMALL = ["stages.held_out.tasks=1000", "stages.blind.tasks=1000"]


@pytest.mark.slow
def test_two_dependent_arms_are_told_apart_by_what_they_pay_alone(tmp_path):
    # Bayes-optimal is 89.4, and chance 50, where the standard error of 1000 trials is 1.3 if one
    # arm alone is pulled in each. Either policy has 100k steps to learn in.
    settings = ["workers.num=0", "learners.threads=1", *STEPS, *SMALL]
    controller.run(load_config(CONFIG, settings), tmp_path / "run", display=Display(quiet=True))
    returns = load(tmp_path / "run").groupby("stage")["return"].mean()
    assert returns["held_out"] > 85
    assert 45 < returns["blind"] < 55
