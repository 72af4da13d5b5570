import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dmrl_ray.jobs.spec import load_family
from dmrl_ray.rllib.environments import EnvCreator, EnvSettings, TaskEnv, TaskVectors, register
from dmrl_ray.types import EnvironmentFault

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()

BANDIT = {"type": "bandit", "arms": 3, "pulls": 4}
FAMILIES = {
    "native": {"type": "point_goal", "horizon": 5},
    "of varying length": "cartpole",
    "images": {"type": "gym", "id": "dmrl_test/Bright-v0"},
    "adapted": {"type": "gym", "id": "CartPole-v1", "vary": {"gravity": [5, 15]}},
    "user's own": "delayed_family:DelayedCartPole",
}


class Bright(gym.Env):
    """Three steps of one grey picture."""

    observation_space = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full((4, 4, 3), 7, np.uint8), {}

    def step(self, action):
        return np.full((4, 4, 3), 7, np.uint8), 1.0, False, False, {}


gym.register("dmrl_test/Bright-v0", Bright, max_episode_steps=3)


def env(tasks, **settings):
    return TaskEnv(EnvSettings.model_validate({"tasks": tasks, **settings}))


def vectors(tasks, num_envs, **settings):
    return TaskVectors(EnvSettings.model_validate({"tasks": tasks, **settings}), num_envs)


def play(made, num_steps, actions):
    """Everything that a vector environment answers, with actions drawn from a generator."""
    made.action_space.seed(actions)
    first, _ = made.reset(seed=0)
    return first, [made.step(made.action_space.sample())[:4] for _ in range(num_steps)]


@pytest.fixture
def own_modules(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])
    yield
    sys.modules.pop("delayed_family", None)


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("previous", ["none", "flat", "parts"])
@pytest.mark.parametrize("whole_trials", [False, True])
@pytest.mark.parametrize("tasks", FAMILIES.values(), ids=list(FAMILIES))
def test_every_kind_of_family_is_a_gymnasium_environment(tasks, whole_trials, previous):
    if previous == "flat" and tasks is FAMILIES["images"]:
        with pytest.raises(ValueError, match="use parts"):
            env(tasks, previous=previous)
        return
    check_env(env(tasks, whole_trials=whole_trials, previous=previous), skip_render_check=True)


def test_a_plain_episode_draws_a_task_and_a_held_one_stays():
    made = env(BANDIT)
    made.reset(seed=3)
    seen = []
    for _ in range(6):
        seen.append(made.get_task().id)
        while not any(made.step(0)[2:4]):
            pass
        made.reset()
    assert len(set(seen)) == 6
    task = made.sample_tasks(1)[0]
    made.set_task(task)
    for _ in range(3):
        assert made.reset()[1]["task_id"] == task.id


def test_a_task_given_as_json_is_the_one_played():
    task = load_family(EnvSettings(tasks=BANDIT).tasks).sample(np.random.default_rng(0), 1, "test")[
        0
    ]
    made = env(BANDIT, task=task.to_json())
    assert made.reset(seed=0)[1]["task_id"] == task.id
    assert made.reset(seed=1)[1]["task_id"] == task.id


def test_tasks_come_from_the_split_asked_for():
    for split in ("train", "validation", "test"):
        made = env(BANDIT, split=split)
        made.reset(seed=0)
        assert made.get_task().split == split


def test_a_trial_is_its_episodes_without_their_ends():
    tasks = {"type": "point_goal", "horizon": 3, "episodes": 2}
    made = env(tasks, whole_trials=True)
    made.reset(seed=0)
    ends = [made.step(np.zeros(2))[2:4] for _ in range(6)]
    assert ends == [(False, False)] * 5 + [(True, False)]
    rows, steps = made.take_episodes()
    assert [(r["episode"], r["length"], r["step"]) for r in rows] == [(0, 3, 3), (1, 3, 6)]
    assert rows[0]["task"] is rows[1]["task"]
    assert steps == 6


def test_a_time_limit_outside_of_trials_stays_a_time_limit():
    made = env({"type": "point_goal", "horizon": 2})
    made.reset(seed=0)
    assert made.step(np.zeros(2))[2:4] == (False, False)
    assert made.step(np.zeros(2))[2:4] == (False, True)


def test_a_recurrent_policy_observes_its_previous_step():
    tasks = {"type": "bandit", "arms": 3, "pulls": 2}
    plain, flat, parts = (env(tasks, previous=p) for p in ("none", "flat", "parts"))
    first = [made.reset(seed=0)[0] for made in (plain, flat, parts)]
    width = len(first[0])
    assert first[1][width:].tolist() == [0, 0, 0, 0, 1]
    assert first[2]["action"] == -1
    assert first[2]["done"] == 1
    answers = [made.step(2) for made in (plain, flat, parts)]
    reward = answers[0][1]
    assert answers[1][0][:width].tolist() == answers[0][0].tolist()
    assert answers[1][0][width:].tolist() == [0, 0, 1, reward, 0]
    assert answers[2][0]["action"] == 2
    assert answers[2][0]["reward"] == reward
    assert answers[2][0]["done"] == 0


def test_the_end_of_an_episode_inside_a_trial_is_observed_with_the_first_observation_of_the_next():
    tasks = {"type": "point_goal", "horizon": 2, "episodes": 2}
    made = env(tasks, whole_trials=True, previous="flat")
    start = made.reset(seed=0)[0]
    made.step(np.ones(2))
    again = made.step(np.ones(2))[0]
    assert again[:2] == pytest.approx(start[:2], abs=0.5)
    assert again[-1] == 1


def test_the_task_is_observed_if_configured():
    made = env({"type": "point_goal"}, observe_task=True)
    obs = made.reset(seed=0)[0]
    params = made.get_task().params
    shown = np.concatenate([np.ravel(params[name]) for name in sorted(params)])
    assert obs[-len(shown) :] == pytest.approx(shown)


@pytest.mark.parametrize("whole_trials", [False, True])
def test_environments_in_lockstep_are_those_of_the_family(whole_trials):
    # The reset step that RLlib expects plays nothing: returns agree with the rewards between.
    tasks = {"type": "point_goal", "horizon": 3, "episodes": 2}
    made = vectors(tasks, 4, whole_trials=whole_trials)
    length = 6 if whole_trials else 3
    _, answers = play(made, 3 * (length + 1), 0)
    rewards = np.array([a[1] for a in answers]).reshape(3, length + 1, 4)
    assert (rewards[:, -1] == 0).all()
    rows, steps = made.take_episodes()
    assert steps == 3 * length * 4
    expected = rewards[:, :length].reshape(3 * length // 3, 3, 4).sum(1).ravel()
    assert [row["return"] for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)
    ended = np.array([a[2] | a[3] for a in answers])[:, 0]
    assert np.flatnonzero(ended).tolist() == [length - 1 + k * (length + 1) for k in range(3)]


def test_an_episode_ends_with_its_true_successor_before_the_reset():
    made = vectors({"type": "point_goal", "horizon": 3}, 2)
    first, _ = made.reset(seed=0)
    ones = np.ones((2, 2), np.float32)
    seen = [made.step(ones)[0] for _ in range(4)]
    moved = np.linalg.norm(np.diff(np.stack([first, *seen]), axis=0)[..., :2], axis=-1)
    assert (moved[:3] > 0).all()
    assert seen[3][:, :2] == pytest.approx(first[:, :2], abs=0.5)
    assert (moved[3] > moved[2]).all()


def test_the_same_seed_plays_the_same_tasks():
    a, b = (play(vectors(BANDIT, 3), 12, 0) for _ in range(2))
    assert all(
        np.array_equal(x, y)
        for s, t in zip(a[1], b[1], strict=True)
        for x, y in zip(s, t, strict=True)
    )


def test_environments_with_episodes_of_different_lengths_are_refused_in_lockstep():
    with pytest.raises(ValueError, match=r"'cartpole' differ in length.* use 'sync'"):
        vectors("cartpole", 2)


def test_non_finite_values_are_reported_with_their_task():
    made = env({"type": "point_goal", "horizon": 3})
    made.reset(seed=0)
    made._envs._env.step = lambda action: (
        np.full((1, 2), np.nan),
        np.zeros(1),
        np.zeros(1, bool),
        np.zeros(1, bool),
        {},
    )
    with pytest.raises(EnvironmentFault, match=rf"not a finite number.*{made.get_task().id}"):
        made.step(np.zeros(2))


def test_an_unknown_family_or_setting_is_reported_at_registration():
    with pytest.raises(ValueError, match="did you mean 'bandit'"):
        register("x", {"type": "bandti"})
    with pytest.raises(ValueError, match="whole_trial"):
        register("x", "bandit", whole_trial=True)
    with pytest.raises(ValueError, match="splt"):
        EnvCreator(EnvSettings(tasks="bandit"))({"splt": "test"})


@pytest.mark.usefixtures("ray_instance")
def test_the_readme_shows_how_to_register_a_family():
    (text,) = re.findall(r"```python\n(# goals_in_rllib.py\n.*?)```", README, re.S)
    scope = {}
    exec(text, scope)
    scope["config"].env_runners(num_env_runners=0, gym_env_vectorize_mode="vector_entry_point")
    made = scope["config"].debugging(log_level="ERROR").build_algo()
    made.env_runner.sample(num_episodes=1)
    rows, _ = made.env_runner.env.unwrapped.take_episodes()
    assert {(row["length"], row["task"].split) for row in rows} == {(20, "test")}
    made.stop()


@pytest.mark.usefixtures("ray_instance")
@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_rllib_trains_on_a_registered_family(mode):
    from ray.rllib.algorithms.ppo import PPOConfig

    register("bandits", BANDIT, previous="flat")
    config = (
        PPOConfig()
        .environment("bandits", env_config={"split": "validation"})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4, gym_env_vectorize_mode=mode)
        .training(train_batch_size_per_learner=32, minibatch_size=32, num_epochs=1)
        .debugging(log_level="ERROR")
    )
    algorithm = config.build_algo()
    result = algorithm.train()["env_runners"]
    made = algorithm.env_runner.env.unwrapped
    made = made if mode != "sync" else made.envs[0].unwrapped
    assert result["episode_len_mean"] == 4
    assert made.take_episodes()[0][0]["task"].split == "validation"
    algorithm.stop()
