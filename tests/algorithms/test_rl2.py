"""A trial is one sequence: memory, inputs and returns run through it whole."""

import numpy as np
import pytest
import torch

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, EvaluateCall, RolloutWorker
from dmrl_ray.losses.returns import trial_advantage
from dmrl_ray.types import Rollout
from tests.learn.first_gradient import first_loss

LSTM = {"type": "lstm", "hidden_size": 16}
WALK = {"type": "point_goal", "horizon": 5, "episodes": 3}


def make_spec(encoder=LSTM, tasks=WALK, num_envs=6, network=None, **settings):
    parts = (
        tasks,
        {"type": "actor_critic", "encoder": encoder} | (network or {}),
        {"type": "rl2"} | settings,
    )
    parts = (Component.model_validate(part) for part in parts)
    return JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=num_envs))


def collected(spec):
    learner = Learner(spec)
    weights = Weights(0, learner.weights())
    report, trial, _ = RolloutWorker().collect(CollectCall(spec, 0, 0, 0), weights, {})
    return learner, trial, report


@pytest.mark.parametrize("squashed", [False, True])
@pytest.mark.parametrize("separate", [None, True])
@pytest.mark.parametrize("encoder", ["lstm", "gru"])
def test_the_first_minibatch_has_ratio_one_over_whole_trials(encoder, separate, squashed):
    spec = make_spec(
        {"type": encoder, "hidden_size": 8},
        network={"separate_value": separate, "squashed": squashed},
        epochs=1,
        minibatches=1,
    )
    learner, trial, _ = collected(spec)
    metrics = learner.update(0, 0, [trial])
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    target = trial[0].value_target
    error = (target - target.mean()) / target.std() - trial[0].value
    assert metrics["value_loss"] == pytest.approx(0.5 * np.square(error).mean(), rel=1e-4)


def test_a_trial_is_all_its_episodes_in_one_sequence():
    _, (rollout,), report = collected(make_spec())
    assert rollout.num_steps == 15
    assert rollout.reset[0].all()
    assert not rollout.reset[1:].any()
    np.testing.assert_array_equal(np.bincount(report.episodes["adaptation_step"]), [6, 6, 6])


def test_advantages_run_through_the_ends_of_episodes():
    spec = make_spec(gae_lambda=1.0, gamma=0.9)
    _, (rollout,), _ = collected(spec)
    # With lambda 1 they are the discounted rewards of the rest of the trial minus the value.
    weights = 0.9 ** np.arange(15)
    whole = (weights[:, None] * rollout.reward).sum(0)
    np.testing.assert_allclose(rollout.advantage[0] + rollout.value[0], whole, rtol=1e-4)
    np.testing.assert_allclose(rollout.value_target, rollout.advantage + rollout.value)


def test_every_trial_begins_afresh():
    spec = make_spec()
    learner, worker = Learner(spec), RolloutWorker()
    for i in range(2):
        weights = Weights(0, learner.weights())
        _, (rollout,), state = worker.collect(CollectCall(spec, 0, i, 0), weights, {})
    assert state == {}
    assert all((leaf == 0).all() for leaf in rollout.initial_memory)
    assert rollout.previous_done.all()
    assert (rollout.previous_reward == 0).all()


def test_the_policy_is_shown_the_reward():
    learner, (rollout,), _ = collected(make_spec())
    policy = learner.policy
    obs = torch.from_numpy(rollout.obs[:1])
    done = torch.zeros(1, 6, dtype=torch.bool)
    outputs = [
        policy(obs, (torch.zeros(1, 6, 2), torch.full((1, 6), r), done), policy.initial_memory(6))
        for r in (0.0, 1.0)
    ]
    assert not torch.equal(outputs[0][0], outputs[1][0])


def test_the_gradient_of_a_late_reward_reaches_an_early_step():
    # The memory is the learner: what is done with an early input must be learnable from late loss.
    learner, trial, _ = collected(make_spec(value_coef=0.0, minibatches=1))
    (rollout,) = [Rollout.concatenate([r]).map(torch.from_numpy) for r in trial]
    found = {}

    def late_alone(batch):
        batch["advantage"] = torch.zeros(15, 6)
        batch["advantage"][-1] = torch.randn(6)
        found["reward"] = batch["previous_reward"].requires_grad_()

    first_loss(learner.algorithm, [rollout], late_alone)[0].backward()
    assert (found["reward"].grad[2] != 0).all()


def test_evaluation_plays_the_episodes_of_a_trial_and_calls_them_shots():
    spec = make_spec()
    learner, _, _ = collected(spec)
    tasks = tuple(learner.algorithm.distribution.sample(np.random.default_rng(0), 4, "test"))
    call = EvaluateCall(spec, tasks, 0, 0, True, 0)
    rows = RolloutWorker().evaluate(call, Weights(0, learner.weights()))
    played = sorted(zip(rows["task_id"], rows["adaptation_step"], strict=True))
    assert played == sorted((task.id, step) for task in tasks for step in range(3))


def test_advantages_are_those_of_the_losses_module():
    _, (rollout,), _ = collected(make_spec(gae_lambda=0.3))
    tensors = torch.from_numpy(rollout.reward), torch.from_numpy(rollout.value)
    expected = trial_advantage(*tensors, gamma=0.99, gae_lambda=0.3)
    np.testing.assert_array_equal(rollout.advantage, expected.numpy())


def train_on_bandits(updates, seed=0, shuffle=False):
    """Mean return of a 5-armed bandit's trials of 10 pulls, held out and greedy."""
    spec = make_spec(
        {"type": "lstm", "hidden_size": 64}, {"type": "bandit"}, num_envs=512, minibatches=8
    )
    learner, worker, rng = Learner(spec), RolloutWorker(), np.random.default_rng(seed)
    for i in range(updates):
        weights = Weights(i, learner.weights())
        _, (rollout,), _ = worker.collect(CollectCall(spec, 0, i, 0), weights, {})
        if shuffle:
            order = rng.permutation(rollout.num_envs)
            rollout.advantage = np.ascontiguousarray(rollout.advantage[:, order])
        learner.update(i, 0, [[rollout]])
    tasks = tuple(learner.algorithm.distribution.sample(np.random.default_rng(1), 2000, "test"))
    call = EvaluateCall(spec, tasks, 0, 0, True, 0)
    return RolloutWorker().evaluate(call, Weights(0, learner.weights()))["return"].mean()


@pytest.mark.slow
def test_rl2_finds_good_arms_of_held_out_bandits():
    # Random arms give 5.0; the Bayes-optimal policy about 6.7.
    assert train_on_bandits(60) > 5.9


@pytest.mark.slow
def test_rl2_learns_nothing_from_other_trials_advantages():
    assert train_on_bandits(60, shuffle=True) < 5.6
