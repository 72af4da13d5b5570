"""The clipped update starts at ratio one, sees every column once and averages over learners."""

from collections import Counter

import numpy as np
import pytest
import torch

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights, build
from dmrl_ray.jobs.worker import CollectCall, EvaluateCall, RolloutWorker
from dmrl_ray.losses.policy_gradient import ppo_clip_loss
from dmrl_ray.types import Rollout
from tests.learn.first_gradient import first_gradient, first_loss, watched

MLP = {"type": "mlp", "hidden_sizes": [8]}
LSTM = {"type": "lstm", "hidden_size": 8}


def make_spec(encoder=MLP, tasks="cartpole", num_envs=6, network=None, **settings):
    parts = (
        tasks,
        {"type": "actor_critic", "encoder": encoder} | (network or {}),
        {"type": "ppo", "num_steps": 30} | settings,
    )
    parts = (Component.model_validate(part) for part in parts)
    return JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=num_envs))


def collected(spec, iterations=2):
    """A learner and the trial of its last iteration, in the middle of episodes."""
    learner, worker, state = Learner(spec), RolloutWorker(), {}
    with torch.no_grad():  # an almost uniform policy would hide what its memory holds
        learner.policy.policy_head.layer.weight *= 50
    for i in range(iterations):
        weights = Weights(0, learner.weights())
        _, trial, state = worker.collect(CollectCall(spec, 0, i, 0), weights, state)
    return learner, trial


def as_tensors(trial):
    return [Rollout.concatenate([rollout]).map(torch.from_numpy) for rollout in trial]


CASES = {
    "mlp": dict(),
    "mlp_shared": dict(network={"separate_value": False}),
    "lstm": dict(encoder=LSTM),
    "gru": dict(encoder={"type": "gru", "hidden_size": 8}),
    "box": dict(tasks="point_goal"),
    "lstm_reset_at_the_start_alone": dict(
        encoder=LSTM, tasks={"type": "point_goal", "horizon": 30}
    ),
    "lstm_box": dict(encoder=LSTM, tasks="point_goal"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_minibatch_has_ratio_one(case):
    # Then the policy loss is minus the mean of standardised advantages: 0.
    learner, trial = collected(make_spec(**CASES[case], epochs=1, minibatches=1))
    metrics = learner.update(0, 0, [trial])
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert metrics["policy_loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["grad_norm"] > 1e-3


@pytest.mark.parametrize("case", ["mlp", "mlp_shared", "lstm"])
def test_the_first_value_loss_is_the_error_of_the_values_when_acting(case):
    # In units of the targets, which an untrained critic is taken to have spoken in.
    learner, trial = collected(make_spec(**CASES[case], epochs=1, minibatches=1))
    metrics = learner.update(0, 0, [trial])
    target = trial[0].value_target
    error = (target - target.mean()) / target.std() - trial[0].value
    assert metrics["value_loss"] == pytest.approx(0.5 * np.square(error).mean(), rel=1e-4)


def seen_by_update(algorithm, trial):
    """The log-probabilities, which are all different, of every minibatch."""
    seen = []
    watched(algorithm, lambda batch: seen.append(batch["log_prob"].clone()))
    algorithm.update(as_tensors(trial))
    return seen


@pytest.mark.parametrize("encoder", [MLP, LSTM], ids=["mlp", "lstm"])
def test_minibatches_cover_everything_once_per_epoch(encoder):
    # 6 columns (180 steps) in 4 unequal parts.
    spec = make_spec(encoder, epochs=3, minibatches=4)
    learner, trial = collected(spec)
    trial[0].log_prob = np.linspace(-1, -0.5, 180, dtype=np.float32).reshape(30, 6)
    seen = seen_by_update(learner.algorithm, trial)
    assert len(seen) == 12
    everything = Counter(trial[0].log_prob.flatten().tolist())
    for epoch in range(3):
        parts = torch.cat([x.flatten() for x in seen[4 * epoch : 4 * epoch + 4]])
        assert Counter(parts.tolist()) == everything


def test_minibatches_of_a_memory_are_whole_columns():
    learner, trial = collected(make_spec(LSTM, epochs=1, minibatches=2))
    trial[0].log_prob = np.linspace(-1, -0.5, 180, dtype=np.float32).reshape(30, 6)
    columns = {tuple(column) for column in trial[0].log_prob.T.tolist()}
    seen = seen_by_update(learner.algorithm, trial)
    assert all(tuple(c) in columns for batch in seen for c in batch.T.tolist())


def test_epochs_shuffle_differently():
    learner, trial = collected(make_spec(epochs=2, minibatches=1))
    trial[0].log_prob = np.linspace(-1, -0.5, 180, dtype=np.float32).reshape(30, 6)
    one, other = seen_by_update(learner.algorithm, trial)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("encoder", [MLP, LSTM], ids=["mlp", "lstm"])
def test_the_shares_of_several_learners_average_to_the_whole_gradient(encoder):
    learner, trial = collected(make_spec(encoder, num_envs=5, epochs=1, minibatches=1))
    algorithm, trial = learner.algorithm, as_tensors(trial)
    whole = first_gradient(algorithm, trial)
    parts = []
    for rank in range(2):  # of 5 columns, one learner has 3 and the other 2
        algorithm.rank, algorithm.world_size = rank, 2
        parts.append(first_gradient(algorithm, trial))
    for expected, one, other in zip(whole, *parts, strict=True):
        torch.testing.assert_close((one + other) / 2, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("encoder", [MLP, LSTM], ids=["mlp", "lstm"])
def test_a_learner_without_a_share_adds_nothing_to_the_gradient(encoder):
    learner, trial = collected(make_spec(encoder, num_envs=1, num_steps=2, minibatches=2))
    algorithm = learner.algorithm
    algorithm.rank, algorithm.world_size = 1, 2
    assert all((g == 0).all() for g in first_gradient(algorithm, as_tensors(trial)))


def test_the_gradient_is_the_policy_gradient_of_standardised_advantages():
    learner, trial = collected(make_spec(value_coef=0.0, epochs=1, minibatches=1))
    algorithm, (rollout,) = learner.algorithm, as_tensors(trial)
    policy = algorithm.policy
    advantage = rollout.advantage
    advantage = (advantage - advantage.mean()) / advantage.std()
    log_prob = policy.policy_head.log_prob(policy(rollout.obs[:-1])[0], rollout.action)
    loss = -(log_prob * advantage).mean()
    expected = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    for a, b in zip(first_gradient(algorithm, [rollout]), expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.75, 0.25)])
def test_an_annealed_entropy_bonus_shrinks_with_what_is_left(progress, share):
    losses = []
    for coefficient in (0.1, 0.2):
        learner, trial = collected(make_spec(entropy_coef=coefficient, anneal_entropy=True))
        learner.algorithm.progress = progress
        loss, report = first_loss(learner.algorithm, as_tensors(trial))
        losses.append(loss.item())
    bonus = 0.1 * share * report["entropy"].item()
    assert losses[0] - losses[1] == pytest.approx(bonus, rel=1e-3)


def test_an_entropy_bonus_raises_the_entropy():
    entropies = []
    for coefficient in (0.0, 10.0):
        spec = make_spec(entropy_coef=coefficient, tasks="point_goal", epochs=10)
        learner, trial = collected(spec)
        learner.update(0, 0, [trial])
        entropies.append(float(learner.policy.policy_head.log_std.detach().sum()))
    assert entropies[1] > entropies[0]


def test_norms_move_after_the_gradient_steps():
    # The steps see the norms that acted; a policy version is one function.
    learner, trial = collected(make_spec(epochs=2))
    norms = []
    watched(learner.algorithm, lambda _: norms.append(learner.policy.obs_norm.mean.clone()))
    learner.update(0, 0, [trial])
    assert all((mean == 0).all() for mean in norms)
    rows = torch.from_numpy(trial[0].obs[:-1]).flatten(0, 1)
    torch.testing.assert_close(learner.policy.obs_norm.mean, rows.mean(0))
    target = torch.from_numpy(trial[0].value_target)
    torch.testing.assert_close(learner.policy.value_norm.mean, target.mean())


def test_the_critic_learns_the_first_targets_in_units_of_their_own():
    # All but one of 180 are -500: that one is sqrt(179) = 13.4 deviations above their mean.
    learner, trial = collected(make_spec(epochs=1, minibatches=1))
    trial[0].value_target = np.full_like(trial[0].value, -500)
    trial[0].value_target[3, 2] = 100
    seen = []
    watched(learner.algorithm, lambda batch: seen.append(batch["target"]))
    learner.update(0, 0, [trial])
    torch.testing.assert_close(seen[0].mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert seen[0].max().item() == pytest.approx(np.sqrt(179), rel=1e-3)
    assert learner.policy.value_norm.batches == 1


def test_a_value_memory_beside_the_actors_is_refused():
    with pytest.raises(ValueError, match=r"network\.separate_value.*whole trials"):
        build(make_spec(LSTM, network={"separate_value": True}))


def test_clip_fraction_counts_ratios_outside_the_trust_interval():
    # Half of the behaviour's log-probabilities are made half as likely: ratio 2 > 1.2.
    learner, trial = collected(make_spec(epochs=1, minibatches=1))
    trial[0].log_prob[:15] -= np.float32(np.log(2))
    metrics = learner.update(0, 0, [trial])
    assert metrics["clip_fraction"] == pytest.approx(0.5)
    # The estimate of the divergence is ratio - 1 - log ratio: 1 - log 2 on half of the steps.
    assert metrics["approx_kl"] == pytest.approx(0.5 * (1 - np.log(2)), rel=1e-3)


def test_the_policy_loss_is_the_clipped_surrogate():
    learner, trial = collected(make_spec(epochs=1, minibatches=1))
    trial[0].log_prob[::3] -= np.float32(np.log(2))
    metrics = learner.update(0, 0, [trial])
    advantage = torch.from_numpy(trial[0].advantage)
    advantage = (advantage - advantage.mean()) / advantage.std()
    now = torch.zeros(30, 6)
    now[::3] = np.log(2)
    expected = ppo_clip_loss(now, torch.zeros(30, 6), advantage, clip=0.2)
    assert metrics["policy_loss"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.slow
def test_ppo_balances_the_pole():
    settings = dict(num_steps=128, lr=3e-3, anneal_lr=True, epochs=4)
    encoder = {"type": "mlp", "hidden_sizes": [64, 64]}
    spec = make_spec(encoder, num_envs=16, **settings)
    learner, worker, state = Learner(spec), RolloutWorker(), {}
    for i in range(80):
        weights = Weights(i, learner.weights())
        _, trial, state = worker.collect(CollectCall(spec, 0, i, 0), weights, state)
        learner.update(i, 0, [trial])
    tasks = tuple(learner.algorithm.distribution.sample(np.random.default_rng(0), 32, "test"))
    call = EvaluateCall(spec, tasks, 0, 0, True, 0)
    rows = RolloutWorker().evaluate(call, Weights(0, learner.weights()))
    assert rows["return"].mean() > 400
