"""Acting under each task's own parameters."""

import pytest
import torch

from dmrl_ray.learn.per_task import TaskActor, per_task, task_forward
from tests.algorithms.adaptation_cases import make_algorithm

TASKS, COLUMNS = 3, 12


def some_params(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p + 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in per_task(policy, TASKS).items()
    }


@pytest.fixture
def policy():
    policy = make_algorithm("maml").policy
    policy.eval()
    return policy


@torch.no_grad()
def test_what_is_replayed_equals_the_forward_pass_to_the_last_bit(policy):
    actor = TaskActor(policy)
    for seed in range(3):
        params = some_params(policy, seed)
        obs = torch.randn(1, COLUMNS, 2)
        acted, _, memory = actor.under(params)(obs, None, (), None)
        expected, _ = task_forward(policy, params, obs, None, (), None)
        assert torch.equal(acted, expected.flatten(1, 2))
        assert memory == ()
    assert len(actor.recordings) == 1


@torch.no_grad()
def test_a_recording_follows_the_observations_norm(policy):
    actor, params = TaskActor(policy), some_params(policy, 0)
    obs = torch.randn(1, COLUMNS, 2)
    before, _, _ = actor.under(params)(obs, None, (), None)
    policy.update_obs_norm(5 + torch.randn(1000, 2))
    after, _, _ = actor.under(params)(obs, None, (), None)
    assert not torch.equal(before, after)
    assert torch.equal(after, task_forward(policy, params, obs, None, (), None)[0].flatten(1, 2))


@torch.no_grad()
def test_every_shape_has_a_recording_of_its_own(policy):
    actor = TaskActor(policy)
    for columns in (COLUMNS, 2 * COLUMNS):
        act = actor.under(some_params(policy, 0))
        acted, _, _ = act(torch.randn(1, columns, 2), None, (), None)
        assert acted.shape[1] == columns
    assert len(actor.recordings) == 2
