"""The contract of task families, checked for each of them."""

import re
import warnings
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dmrl_ray.envs.bandit import Bandit
from dmrl_ray.envs.cartpole import CartPole
from dmrl_ray.envs.grid_nav import GridNav
from dmrl_ray.envs.gym_env import GymEnv
from dmrl_ray.envs.informative_bandit import InformativeBandit
from dmrl_ray.envs.observe import Observe
from dmrl_ray.envs.point_goal import PointGoal
from dmrl_ray.envs.registration import FAMILIES, SingleEnv, register
from dmrl_ray.envs.restless_bandit import RestlessBandit
from dmrl_ray.envs.tabular_mdp import TabularMDP
from dmrl_ray.envs.two_step import TwoStep
from dmrl_ray.types import SPLITS

RANGES = {"gravity": [5, 15], "length": [0.25, 1]}
CASES = {
    "bandit": (Bandit, {"arms": 3}),
    "bandit_correlated": (Bandit, {"arms": 2, "prior": "correlated_uniform"}),
    "bandit_hard": (Bandit, {"arms": 2, "prior": "hard"}),
    "informative_bandit": (InformativeBandit, {}),
    "restless_bandit": (RestlessBandit, {"pulls": 30}),
    "two_step": (TwoStep, {"rounds": 28, "reversal": 0.15}),
    "tabular_mdp": (TabularMDP, {}),
    "grid_nav": (GridNav, {"held_out": 3}),
    "point_goal": (PointGoal, {"horizon": 7}),
    "point_goal_semicircle": (PointGoal, {"horizon": 30, "goal": "semicircle"}),
    "point_goal_sparse": (PointGoal, {"horizon": 30, "goal": "semicircle", "sparse_radius": 0.95}),
    "cartpole": (CartPole, RANGES),
    "gym_discrete": (GymEnv, {"id": "CartPole-v1", "vary": RANGES}),
    "observe_task": (Observe, {"of": {"type": "cartpole"} | RANGES}),
    "observe_task_and_belief": (
        Observe,
        {"of": {"type": "grid_nav", "held_out": 3}, "show": ["task", "belief"]},
    ),
    "gym_box": (GymEnv, {"id": "Pendulum-v1", "vary": {"g": [5, 15]}, "max_episode_steps": 9}),
}
FEW_TASKS = {"bandit_hard", "informative_bandit", "gym_choices", "two_step_steady"}
"""Families of so few tasks that splits share them."""

CHOICES = {"gravity": {"choices": [5, 10, 15]}, "length": {"choices": [0.25, 0.5]}}
FINITE = {
    "grid_nav": (GridNav, {}, 21),
    "informative_bandit": (InformativeBandit, {}, 10),
    "gym_choices": (GymEnv, {"id": "CartPole-v1", "vary": CHOICES}, 6),
    "two_step_short": (TwoStep, {"rounds": 4, "reversal": 0.5}, 16),
}
"""Finite families and their number of tasks, of which `HELD_OUT` can be held out."""
HELD_OUT = {"grid_nav": 5, "informative_bandit": 3, "gym_choices": 2, "two_step_short": 0.25}
SPLIT = CASES | {
    "gym_choices": FINITE["gym_choices"][:2],
    "two_step_steady": (TwoStep, {"reversal": 0}),
    "two_step_held_out": (TwoStep, {"rounds": 20, "held_out": 0.3}),
}


def made(name):
    kind, settings = SPLIT[name]
    return kind(kind.Config.model_validate(settings))


def stream(seed=0):
    return np.random.default_rng(seed)


def started(family, seed=0, num_envs=5, tracks_belief=False):
    """Environments on sampled tasks after a reset, and the first observations."""
    env = family.make_vec(num_envs)
    env.np_random = stream(seed)
    env.tracks_belief = tracks_belief
    env.set_tasks(family.sample(stream(), num_envs, "train"))
    return env, env.reset()[0]


def random_actions(env, num_steps, seed=0):
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(num_steps)]


def play(env, actions):
    """Observations, rewards and both flags of every step, each (T, B, ...)."""
    return [np.array(part) for part in zip(*(env.step(a)[:4] for a in actions), strict=True)]


def has(name, method):
    """Whether the family of a case implements a method."""
    try:
        getattr(started(made(name), tracks_belief=True)[0], method)()
    except NotImplementedError:
        return False
    return True


WITH_BELIEF = [name for name in CASES if has(name, "belief") and CASES[name][0] is not Observe]
WITH_EXPERT = [name for name in CASES if has(name, "expert_action")]
WITH_BEST_ACTION = [name for name in WITH_EXPERT if has(name, "best_action")]


@pytest.fixture(params=CASES)
def family(request):
    return made(request.param)


@pytest.fixture(params=WITH_BELIEF)
def family_with_belief(request):
    return made(request.param)


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_single_environment_passes_gymnasiums_check(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unbounded velocities, and no spec outside gym.make
        check_env(SingleEnv(family, render_mode="rgb_array"), skip_render_check=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_registered_family_can_be_made_both_ways(name):
    register()
    register()  # a second call changes nothing
    single = gym.make(f"dmrl/{name}-v0", render_mode="rgb_array")
    single.reset(seed=3)
    vector = gym.make_vec(f"dmrl/{name}-v0", num_envs=2)
    assert vector.reset(seed=3)[0].shape == (2, *single.observation_space.shape)
    assert single.render().ndim == 3


def test_the_same_stream_gives_the_same_episodes(family):
    env, obs = started(family)
    actions = random_actions(env, 40)
    first = play(env, actions)
    again, again_obs = started(family)
    assert_same([obs, *first], [again_obs, *play(again, actions)])


def test_a_task_takes_effect_at_reset_and_not_before(family):
    env, _ = started(family)
    other, _ = started(family)
    actions = random_actions(env, 5)
    other.set_tasks(family.sample(stream(9), 5, "test"))
    assert_same(play(env, actions), play(other, actions))
    for each in (env, other):
        each.np_random = stream(1)
        each.reset()
    actions = random_actions(env, 9, seed=1)
    pairs = zip(play(env, actions), play(other, actions), strict=True)
    assert not all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", SPLIT)
def test_splits_share_no_task_even_from_streams_in_the_same_state(name):
    family = made(name)
    ids = [{task.id for task in family.sample(stream(), 50, split)} for split in SPLITS]
    if name in FEW_TASKS:  # The ids show that they are shared.
        assert ids[0] == ids[1] == ids[2]
        return
    assert not ids[0] & ids[1]
    assert not ids[0] & ids[2]
    assert not ids[1] & ids[2]


@pytest.mark.parametrize("name", FINITE)
def test_held_out_tasks_divide_a_finite_family_without_changing_its_tasks(name):
    kind, settings, size = FINITE[name]
    shared, kept = (
        [
            {task.id for task in family.sample(stream(), 1000, split)}
            for family in [kind(kind.Config.model_validate(settings | changes))]
            for split in SPLITS
        ]
        for changes in ({}, {"held_out": HELD_OUT[name]})
    )
    assert shared[0] == shared[1] == shared[2] == kept[0] | kept[1] | kept[2]
    assert sum(map(len, kept)) == len(shared[0]) == size
    assert min(map(len, kept)) > 0


KEPT = {
    "grid_nav": (GridNav, {"held_out": 5}),
    "informative_bandit": (InformativeBandit, {"held_out": 3}),
    "two_step": (TwoStep, {"rounds": 10, "reversal": 0.1, "held_out": 0.25}),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", KEPT)
def test_the_expert_scores_1_on_the_tasks_of_each_split(name, split):
    kind, settings = KEPT[name]
    family = kind(kind.Config(**settings))
    env, tasks = family.make_vec(4000), family.sample(stream(1), 4000, split)
    env.tracks_belief = True
    env.np_random = stream()
    env.set_tasks(tasks)
    env.reset()
    reference = family.reference(tasks[0])
    for episode in range(family.episodes_per_trial):
        steps = range(family.max_episode_steps)
        total = sum(env.step(env.expert_action())[1].astype(float) for _ in steps)
        score = reference.score(np.array(episode), total)
        assert score.mean() == pytest.approx(1, abs=5 * score.std() / np.sqrt(len(tasks)))


def test_sampling_is_a_function_of_the_stream_and_ids_name_parameters(family):
    one, same, other = (family.sample(stream(seed), 20, "train") for seed in (0, 0, 1))
    assert [t.to_json() for t in one] == [t.to_json() for t in same]
    assert [t.id for t in one] != [t.id for t in other]
    by_params = {str(t.to_json()["params"]): t.id for t in one + other}
    assert len(by_params) == len(set(by_params.values())) == len({t.id for t in one + other})
    assert all(re.fullmatch("[0-9a-f]{16}", t.id) for t in one)


def test_box_actions_lie_between_minus_one_and_one(family):
    space = family.action_space
    if isinstance(space, gym.spaces.Box):
        assert (space.low == -1).all()
        assert (space.high == 1).all()
    else:
        assert isinstance(space, gym.spaces.Discrete)
        assert space.start == 0


def test_an_end_returns_the_next_first_observation_and_keeps_the_last_one(family):
    # The true successor is the observation of a copy that is not reset.
    env, _ = started(family)
    ends = 0
    for action in random_actions(env, 60):
        state, random = env.get_state(), deepcopy(env.np_random)
        obs, _, terminated, truncated, infos = env.step(action)
        done = terminated | truncated
        if not done.any():
            assert "final_obs" not in infos
            continue
        ends += 1
        fresh = family.make_vec(5)
        fresh.np_random = random
        fresh.set_state(state)
        getattr(fresh, "env", fresh).begin = lambda env_ids: None
        last = fresh.step(action)[0]
        np.testing.assert_array_equal(infos["final_obs"][done], last[done])
        np.testing.assert_array_equal(obs[~done], last[~done])
        for b in np.flatnonzero(done):
            assert family.observation_space.contains(obs[b])
    assert ends > 0


def test_open_episodes_continue_from_their_state_in_another_process(family):
    env, _ = started(family)
    play(env, random_actions(env, 6))
    env.set_tasks(family.sample(stream(5), 5, "train"))  # pending tasks are part of the state
    state = {name: array.copy() for name, array in env.get_state().items()}
    copy = family.make_vec(5)
    copy.set_state(state)
    actions = random_actions(env, 40, seed=2)
    env.np_random, copy.np_random = stream(7), stream(7)
    assert_same(play(env, actions), play(copy, actions))
    assert all(len(array) == 5 for array in state.values())


def test_a_state_is_a_copy(family):
    env, _ = started(family)
    before = env.get_state()
    kept = {name: array.copy() for name, array in before.items()}
    play(env, random_actions(env, 3))
    assert_same(before.values(), kept.values())


def test_no_episode_is_longer_than_max_episode_steps(family):
    env, _ = started(family)
    length, lengths = np.zeros(5, int), []
    for action in random_actions(env, 2 * min(family.max_episode_steps, 40) + 1):
        _, _, terminated, truncated, _ = env.step(action)
        length += 1
        lengths += length[terminated | truncated].tolist()
        length[terminated | truncated] = 0
    assert lengths
    assert max(lengths) <= family.max_episode_steps
    assert not family.fixed_length or set(lengths) == {family.max_episode_steps}


def test_arrays_already_returned_do_not_change(family):
    env, obs = started(family)
    kept = obs.copy()
    reward = env.step(random_actions(env, 1)[0])[1]
    kept_reward = reward.copy()
    play(env, random_actions(env, 20, seed=4))
    np.testing.assert_array_equal(obs, kept)
    np.testing.assert_array_equal(reward, kept_reward)


def test_types_are_those_of_the_contract(family):
    env, obs = started(family)
    _, reward, terminated, truncated, _ = env.step(random_actions(env, 1)[0])
    assert obs.dtype == family.observation_space.dtype
    assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float32, bool, bool)
    picture = env.render()
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert picture.size < 40_000


def test_a_belief_changes_with_experience_and_is_part_of_the_state(family_with_belief):
    env, _ = started(family_with_belief, tracks_belief=True)
    first = env.belief()
    play(env, random_actions(env, 6))
    env.set_tasks(family_with_belief.sample(stream(5), 5, "train"))
    assert not np.array_equal(first, env.belief())
    copy = family_with_belief.make_vec(5)
    copy.tracks_belief = True
    copy.set_state(env.get_state())
    for action in random_actions(env, 2 * min(family_with_belief.max_episode_steps, 40), seed=2):
        np.testing.assert_array_equal(env.belief(), copy.belief())
        for each in (env, copy):
            each.np_random = stream(7)
            each.step(action)


def test_a_belief_is_reset_at_the_first_reset_after_set_tasks(family_with_belief):
    env, _ = started(family_with_belief, tracks_belief=True)
    first = env.belief()
    play(env, random_actions(env, 12))
    env.reset()
    later = env.belief()
    assert not np.array_equal(first, later)
    env.set_tasks(family_with_belief.sample(stream(9), 5, "train"))
    np.testing.assert_array_equal(env.belief(), later)
    env.begin(np.array([1, 3]))
    np.testing.assert_array_equal(env.belief()[[1, 3]], first[[1, 3]])
    np.testing.assert_array_equal(env.belief()[[0, 2]], later[[0, 2]])
    play(env, random_actions(env, 12, seed=3))
    env.begin(np.array([1, 3]))
    assert not np.array_equal(env.belief()[[1, 3]], first[[1, 3]])


@pytest.mark.parametrize("name", WITH_BELIEF)
def test_belief_and_expert_depend_on_the_task_through_experience_alone(name):
    # The state that differs between two environments on different tasks before the first step
    # holds the task parameters: exchange those and nothing else.
    family = made(name)
    env, other = (started(family, tracks_belief=True)[0] for _ in range(2))
    other.set_tasks(family.sample(stream(9), 5, "train"))
    other.np_random = stream()
    other.reset()
    mine, theirs = env.get_state(), other.get_state()
    hidden = [key for key in mine if not np.array_equal(mine[key], theirs[key])]
    assert hidden
    np.testing.assert_array_equal(env.belief(), other.belief())
    play(env, random_actions(env, min(8, family.max_episode_steps - 1)))
    other.set_state(env.get_state() | {key: theirs[key] for key in hidden})
    np.testing.assert_array_equal(env.belief(), other.belief())
    if name in WITH_EXPERT:
        np.testing.assert_array_equal(env.expert_action(), other.expert_action())


def test_no_belief_is_tracked_by_default(family_with_belief):
    env, _ = started(family_with_belief)
    fresh = family_with_belief.make_vec(5)
    play(env, random_actions(env, 12))
    assert set(env.get_state()) == set(env.state_fields)
    for name in env.belief_fields:
        np.testing.assert_array_equal(getattr(env, name), getattr(fresh, name))


def test_a_belief_is_about_unit_scale(family_with_belief):
    env, _ = started(family_with_belief, tracks_belief=True)
    for action in random_actions(env, 50):
        belief = env.belief()
        assert belief.dtype == np.float32
        assert belief.shape == (5, belief.shape[1])
        assert np.abs(belief).max() < 10
        env.step(action)


@pytest.mark.parametrize("name", WITH_EXPERT)
def test_the_expert_has_a_higher_return_than_random_actions(name):
    family = made(name)
    total = []
    for is_expert in (True, False):
        env, _ = started(family, num_envs=2000, tracks_belief=True)
        returns = np.zeros(2000)
        for random in random_actions(env, family.trial_steps, seed=3):
            action = env.expert_action() if is_expert else random
            assert env.action_space.contains(action)
            returns += env.step(action)[1]
        total.append(returns)
    error = np.sqrt(sum(returns.var() / 2000 for returns in total))
    assert total[0].mean() > total[1].mean() + 5 * error


@pytest.mark.parametrize("name", WITH_BEST_ACTION)
def test_best_actions_have_a_higher_return_than_the_expert(name):
    family = made(name)
    total = []
    for method in ("best_action", "expert_action"):
        env, _ = started(family, num_envs=2000, tracks_belief=True)
        returns = np.zeros(2000)
        for _ in range(family.trial_steps):
            action = getattr(env, method)()
            assert env.action_space.contains(action)
            returns += env.step(action)[1]
        total.append(returns)
    error = np.sqrt(sum(returns.var() / 2000 for returns in total))
    assert total[0].mean() > total[1].mean() + 5 * error
