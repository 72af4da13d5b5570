"""A buffer keeps the transitions of tasks apart, in order, and is the same after a checkpoint."""

import numpy as np
import pytest
import torch

from dmrl_ray.data.replay import ReplayBuffer
from dmrl_ray.envs.cartpole import CartPole
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler

STEPS, ENVS = 30, 4
CPU = torch.device("cpu")


def trials(count, num_envs=ENVS):
    """Random play on poles: episodes of unequal length, two rollouts to a trial."""
    torch.manual_seed(0)
    family = CartPole(CartPole.Config())
    spaces = family.observation_space, family.action_space
    policy = ActorCritic(ActorCritic.Config(), *spaces, sees_previous=False)
    sampler = Sampler(family, num_envs, memory_spans_trial=False)
    rng = np.random.default_rng(0)
    sampler.start(rng, 0)
    for _ in range(count):
        sampler.begin_trial(family.sample(rng, num_envs, "train"), policy)
        rollouts = [sampler.rollout(policy, STEPS // 2, with_value=False) for _ in range(2)]
        yield [rollout.map(torch.from_numpy) for rollout in rollouts]


def filled(count, capacity):
    replay, collected = ReplayBuffer(capacity), list(trials(count))
    for trial in collected:
        replay.add(trial)
    return replay, collected


def rewards_marked(trial, mark):
    """The same trial with ``1000 mark + 100 environment + step`` as its rewards."""
    for i, rollout in enumerate(trial):
        step = torch.arange(STEPS // 2) + i * STEPS // 2
        rollout.reward = 1000.0 * mark + 100.0 * torch.arange(ENVS) + step.unsqueeze(1)
    return trial


def test_a_slot_is_an_environment_in_the_order_of_collection():
    replay, (trial,) = filled(1, capacity=8)
    for env in range(ENVS):
        slot = replay.take(np.array([env]))
        for name in ("action", "reward", "terminated", "truncated"):
            collected = torch.cat([getattr(r, name)[:, env] for r in trial])
            assert torch.equal(getattr(slot, name)[0], collected), name
        assert torch.equal(slot.obs[0], torch.cat([r.obs[:-1, env] for r in trial]))


def test_the_successor_is_the_true_one_where_an_episode_ended():
    replay, (trial,) = filled(1, capacity=8)
    steps = replay.take(np.arange(ENVS))
    assert trial[0].final_step.numel() + trial[1].final_step.numel() > 0
    for i, rollout in enumerate(trial):
        at = rollout.final_step + i * STEPS // 2
        assert torch.equal(steps.next_obs[rollout.final_env, at], rollout.final_obs)
    within = ~(steps.terminated | steps.truncated)[:, :-1]
    assert torch.equal(steps.next_obs[:, :-1][within], steps.obs[:, 1:][within])


def test_the_newest_trials_replace_the_oldest():
    replay = ReplayBuffer(6)
    for mark, trial in enumerate(trials(3)):
        replay.add(rewards_marked(trial, mark))
    # Of 12 environments' trials in 6 slots the last 6 are there: from environment 2 of trial 1 on.
    kept = sorted(replay.take(np.arange(6)).reward[:, 0].tolist())
    assert kept == [1200, 1300, 2000, 2100, 2200, 2300]


def test_of_more_environments_than_slots_the_last_stay():
    replay = ReplayBuffer(3)
    replay.add(rewards_marked(next(trials(1)), 0))
    assert sorted(replay.take(np.arange(3)).reward[:, 0].tolist()) == [100, 200, 300]


def test_every_slot_gives_its_own_steps():
    replay = ReplayBuffer(8)
    replay.add(rewards_marked(next(trials(1)), 0))
    taken = replay.take(np.array([3, 1]), np.array([[0, 29, 7], [5, 5, 16]]))
    assert taken.reward.tolist() == [[300, 329, 307], [105, 105, 116]]
    assert replay.take(np.array([3, 1]), slice(2, 4)).reward.tolist() == [[302, 303], [102, 103]]


def test_only_slots_that_hold_something_are_drawn_and_none_twice():
    replay, _ = filled(1, capacity=100)
    drawn = replay.sample(np.random.default_rng(0), 50)
    assert sorted(drawn) == list(range(ENVS))


@pytest.mark.parametrize("capacity", [6, 9, 100], ids=["wrapped", "full", "part"])
def test_a_buffer_continues_from_a_checkpoint_as_if_it_had_not_stopped(capacity):
    first, later = list(trials(2)), list(trials(3))[2]
    stayed, loaded = ReplayBuffer(capacity), ReplayBuffer(capacity)
    for trial in first:
        stayed.add(trial)
    loaded.set_state(stayed.get_state(), CPU)
    for replay in (stayed, loaded):
        replay.add(later)
    assert loaded.get_state().keys() == stayed.get_state().keys()
    for name, array in stayed.get_state().items():
        np.testing.assert_array_equal(loaded.get_state()[name], array)


def test_an_empty_buffer_survives_a_checkpoint():
    replay = ReplayBuffer(5)
    replay.set_state(ReplayBuffer(5).get_state(), CPU)
    replay.add(next(trials(1)))
    assert replay.size == ENVS


@pytest.mark.parametrize("capacity", [5, 100])
def test_a_buffer_of_another_size_is_refused(capacity):
    replay, _ = filled(2, capacity=6)
    with pytest.raises(ValueError, match=rf"replay: 6 trials do not fit into {capacity} slots"):
        ReplayBuffer(capacity).set_state(replay.get_state(), CPU)
