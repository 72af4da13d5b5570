"""Reptile follows what its inner steps lead to."""

import pytest
import torch

from dmrl_ray.learn.per_task import task_log_prob
from dmrl_ray.losses.policy_gradient import likelihood_ratio_loss
from tests.algorithms.adaptation_cases import make_algorithm, one_trial

FREE = {"optimizer": "sgd", "max_grad_norm": 1e6}


def weights(algorithm):
    return {n: p.detach().clone() for n, p in algorithm.policy.named_parameters()}


@pytest.mark.parametrize("tasks", ["point_goal", "bandit"])
def test_the_learner_adapts_exactly_as_the_worker_did(tasks):
    reptile = make_algorithm("reptile", tasks=tasks, inner_steps=3)
    trial = one_trial(reptile)
    assert len(trial) == 3  # nothing acts after the last step
    for params, rollout in zip(reptile.adapted_params(trial), trial, strict=False):
        log_prob = task_log_prob(reptile.policy, params, rollout).flatten(1)
        torch.testing.assert_close(log_prob, rollout.log_prob)


def test_one_inner_step_is_joint_training():
    # The mean of the tasks' gradients is the gradient of their mean loss, at the outer step size.
    reptile = make_algorithm("reptile", inner_steps=1, lr=0.05, inner_lr=0.3, **FREE)
    (rollout,) = one_trial(reptile)
    before = weights(reptile)
    pi = reptile.policy(rollout.obs[:-1])[0]
    log_prob = reptile.policy.policy_head.log_prob(pi, rollout.action)
    likelihood_ratio_loss(log_prob, rollout.log_prob, rollout.advantage).backward()
    gradient = {n: p.grad.clone() for n, p in reptile.policy.named_parameters() if "value" not in n}
    reptile.update([rollout])
    for name, parameter in reptile.policy.named_parameters():
        if name in gradient:
            expected = before[name] - 0.05 * gradient[name]
            torch.testing.assert_close(parameter.data, expected, rtol=1e-4, atol=1e-6)


def test_a_step_as_long_as_the_inner_ones_ends_at_the_mean_of_the_adapted_weights():
    reptile = make_algorithm("reptile", inner_steps=3, lr=0.1, inner_lr=0.1, **FREE)
    trial = one_trial(reptile)
    end = reptile.adapted_params(trial)[-1]
    reptile.update(trial)
    for name, parameter in reptile.policy.named_parameters():
        if name in end:
            torch.testing.assert_close(parameter.data, end[name].mean(0), rtol=1e-4, atol=1e-6)


def test_the_shares_of_several_learners_average_to_the_whole_step():
    moves = {}
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        reptile = make_algorithm("reptile", lr=0.1, **FREE)
        reptile.rank, reptile.world_size = rank, world_size
        before, trial = weights(reptile), one_trial(reptile)
        reptile.update(trial)
        after = weights(reptile)
        moves[rank, world_size] = {name: after[name] - before[name] for name in before}
    for name, whole in moves[0, 1].items():
        average = (moves[0, 2][name] + moves[1, 2][name]) / 2
        torch.testing.assert_close(average, whole, rtol=1e-4, atol=1e-6)


def test_a_frozen_part_stays_though_the_inner_steps_move_it():
    reptile = make_algorithm("reptile")
    trial = one_trial(reptile)
    reptile.prepare_training(("policy_head",))
    before = weights(reptile)
    reptile.update(trial)
    for name, parameter in reptile.policy.named_parameters():
        assert torch.equal(before[name], parameter) != name.startswith("policy_head."), name
