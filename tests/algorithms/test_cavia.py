"""CAVIA's two loops share no parameter."""

import pytest
import torch

from dmrl_ray.learn.per_task import task_log_prob
from tests.algorithms.adaptation_cases import make_algorithm, one_trial, outer_gradient


def make_cavia(kind="cavia", **settings):
    return make_algorithm(kind, **{"context": 3} | settings)


def test_the_learner_adapts_exactly_as_the_worker_did():
    cavia = make_cavia(inner_steps=2)
    trial = one_trial(cavia)
    for params, rollout in zip(cavia.adapted_params(trial), trial, strict=True):
        log_prob = task_log_prob(cavia.policy, params, rollout).flatten(1)
        torch.testing.assert_close(log_prob, rollout.log_prob)


def test_the_inner_loop_moves_the_context_alone_and_from_zero():
    cavia = make_cavia()
    before, after = cavia.adapted_params(one_trial(cavia))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"context"}
    assert (before["context"] == 0).all()
    assert (after["context"] != 0).all()


def test_tasks_come_to_contexts_of_their_own():
    cavia = make_cavia()
    first, second, third = cavia.adapted_params(one_trial(cavia))[-1]["context"]
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)


@pytest.mark.parametrize("outer", ["clip", "trpo", "vpg"])
def test_the_outer_loop_moves_everything_that_acts_but_the_context(outer):
    decay = {} if outer == "trpo" else {"optimizer": "adamw", "weight_decay": 0.1}
    cavia = make_cavia(outer=outer, **decay)
    before = {n: p.detach().clone() for n, p in cavia.policy.named_parameters()}
    cavia.update(one_trial(cavia))
    for name, parameter in cavia.policy.named_parameters():
        acts = name.startswith(("encoder.", "policy_head."))
        assert torch.equal(before[name], parameter) != acts, name


def test_it_is_maml_that_adapts_the_context():
    cavia, maml = make_cavia(inner_lr=0.5), make_cavia("maml", trainable=("context",), inner_lr=0.5)
    trial = one_trial(cavia)
    expected = outer_gradient(maml, trial)
    for name, gradient in outer_gradient(cavia, trial).items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_policy_without_context_is_refused():
    with pytest.raises(ValueError, match=r"network\.context.*width 0.*context: 8"):
        make_cavia(context=0)
