import numpy as np
import pytest

from dmrl_ray.envs.tabular_mdp import TabularMDP, psrl_return
from dmrl_ray.envs.tabular_oracle import (
    ACTIONS,
    HORIZON,
    STATES,
    optimistic_action,
    plan,
    random_return,
)
from dmrl_ray.types import Task


def family():
    return TabularMDP(TabularMDP.Config())


def arrays(task):
    return np.asarray(task.params["transition"], float), task.params["reward_mean"]


def started(task, num_envs, seed=0):
    env = family().make_vec(num_envs)
    env.np_random = np.random.default_rng(seed)
    env.set_tasks([task] * num_envs)
    env.reset()
    return env


def returns_of(env, choose):
    """(B,) returns of one episode in which `choose(t, states)` picks the actions."""
    total = np.zeros(env.num_envs)
    for t in range(HORIZON):
        total += env.step(choose(t, env.state.copy()))[1]
    return total


def test_a_plan_in_a_chain_by_hand():
    # Action 0 moves to the next state, the others stay; only the last state has a reward, 1 a step.
    # From state 0 the agent arrives after 9 steps, for the reward of the tenth.
    transition = np.zeros((STATES, ACTIONS, STATES))
    for state in range(STATES):
        transition[state, :, state] = 1
        transition[state, 0] = np.eye(STATES)[min(state + 1, STATES - 1)]
    reward = np.zeros((STATES, ACTIONS))
    reward[-1] = 1
    policy, value = plan(transition, reward)
    assert value[0] == pytest.approx(1)
    assert value[7] == pytest.approx(8)
    assert (policy[:9, 0] == 0).sum() == 9


def test_the_oracle_return_is_that_of_its_policy():
    task = family().sample(np.random.default_rng(3), 1, "test")[0]
    policy, value = plan(*arrays(task))
    total = returns_of(started(task, 20_000), lambda t, state: policy[t, state])
    assert total.mean() == pytest.approx(value[0], abs=4 * total.std() / np.sqrt(20_000))
    assert family().reference(task).oracle == pytest.approx(np.full(10, value[0]))


def test_the_random_return_is_that_of_random_actions():
    task = family().sample(np.random.default_rng(4), 1, "test")[0]
    rng = np.random.default_rng(0)
    total = returns_of(started(task, 20_000), lambda t, s: rng.integers(ACTIONS, size=len(s)))
    expected = random_return(*arrays(task))
    assert total.mean() == pytest.approx(expected, abs=4 * total.std() / np.sqrt(20_000))


def test_mean_oracle_is_the_published_one():
    # 21.84 per episode with the MDP known, 10.0 at random (RL^2's table 2: 100.1 in 10 episodes).
    tasks = family().sample(np.random.default_rng(0), 1500, "test")
    ends = [family().reference(task) for task in tasks]
    assert np.mean([end.oracle for end in ends]) == pytest.approx(21.84, abs=0.3)
    assert np.mean([end.random for end in ends]) == pytest.approx(10.0, abs=0.3)


def test_the_return_of_posterior_sampling_is_the_known_one():
    # 133.3 +- 0.8 measured elsewhere with the same prior; RL^2's table 2 has 138.1.
    total = psrl_return(10, 3000, np.random.default_rng(0))
    assert total.mean() == pytest.approx(133.3, abs=2.4)


def test_transitions_and_noise_have_their_distributions():
    task = family().sample(np.random.default_rng(5), 1, "train")[0]
    transition, reward_mean = arrays(task)
    env = started(task, 50_000)
    _, reward, *_ = env.step(np.full(50_000, 2))
    frequency = np.bincount(env.state, minlength=STATES) / 50_000
    np.testing.assert_allclose(frequency, transition[0, 2], atol=0.01)
    assert reward.mean() == pytest.approx(reward_mean[0, 2], abs=0.02)
    assert reward.std() == pytest.approx(1, abs=0.02)


def test_an_impossible_transition_never_happens():
    transition = np.zeros((STATES, ACTIONS, STATES))
    transition[:, :, [4, 9]] = 0.5
    task = Task("a", "b", "train", {"transition": transition, "reward_mean": np.zeros((10, 5))})
    env = started(task, 1000)
    env.step(np.zeros(1000, int))
    assert set(env.state) == {4, 9}


def test_the_return_of_the_expert_action_is_the_known_one():
    # 162.5 +- 0.5 measured over 8000 MDPs; RL^2 has 156.2, SNAIL 159.1 in their tables.
    env = family().make_vec(1500)
    env.np_random = np.random.default_rng(0)
    env.tracks_belief = True
    env.set_tasks(family().sample(np.random.default_rng(1), 1500, "test"))
    env.reset()
    total = sum(env.step(env.expert_action())[1] for _ in range(100))
    assert total.mean() == pytest.approx(162.5, abs=2.4)


def random_statistics(num_envs, rng):
    """Random transition counts, reward sums, states and time steps of as many environments."""
    count = rng.poisson(0.5, (num_envs, STATES * ACTIONS, STATES))
    reward_sum = rng.normal(1, 1, (num_envs, STATES * ACTIONS)) * count.sum(axis=-1)
    t = rng.integers(HORIZON, size=num_envs)
    return (
        count.astype(np.float32),
        reward_sum.astype(np.float32),
        rng.integers(STATES, size=num_envs),
        t,
    )


def test_in_the_last_step_there_is_no_exploration_bonus():
    # With one step left the bonus is 0 at any time step, so that the action is that of backward
    # induction in the mean MDP.
    count, reward_sum, state, t = random_statistics(300, np.random.default_rng(0))
    action = optimistic_action(count, reward_sum, state, t, np.ones(300))
    visits = count.sum(axis=-1)
    transition = ((count + 1) / (visits + STATES)[..., None]).reshape(300, STATES, ACTIONS, STATES)
    policy, _ = plan(transition, ((reward_sum + 1) / (visits + 1)).reshape(300, STATES, ACTIONS))
    np.testing.assert_array_equal(action, policy[t, np.arange(300), state])


def test_of_equal_means_the_action_with_fewer_visits_is_chosen():
    count, reward_sum = np.zeros((1, STATES * ACTIONS, STATES)), np.zeros((1, STATES * ACTIONS))
    count[0, :, 0] = 4
    count[0, 3, 0] = 1
    reward_sum[:] = count.sum(axis=-1)  # every mean is 1
    last = np.array([HORIZON - 1])
    assert optimistic_action(count, reward_sum, np.zeros(1, int), last, np.array([50])) == 3


def test_a_belief_counts_observed_transitions():
    task = family().sample(np.random.default_rng(6), 1, "train")[0]
    env = family().make_vec(1)
    env.np_random = np.random.default_rng(0)
    env.tracks_belief = True
    env.set_tasks([task])
    env.reset()
    reward = env.step(np.array([2]))[1][0]
    transition, mean, count, done = np.split(env.belief()[0], [500, 550, 600])
    expected = np.full(STATES, 1 / 11)
    expected[env.state[0]] = 2 / 11
    np.testing.assert_allclose(transition.reshape(50, 10)[2], expected, rtol=1e-6)
    np.testing.assert_allclose(np.delete(transition.reshape(50, 10), 2, axis=0), 0.1, rtol=1e-6)
    assert mean[2] == pytest.approx((1 + reward) / 2)
    assert np.flatnonzero(count).tolist() == [2]
    assert done[0] == pytest.approx(0.01)
