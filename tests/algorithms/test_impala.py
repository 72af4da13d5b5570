"""Old data is corrected to the policy of the moment; with fresh data nothing changes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmrl_ray.algorithms import impala
from dmrl_ray.algorithms.ppo import PPO
from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.control import controller
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights, build
from dmrl_ray.jobs.worker import CollectCall, EvaluateCall, RolloutWorker
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.types import Rollout
from tests.learn.first_gradient import first_gradient, first_loss, watched

MLP = {"type": "mlp", "hidden_sizes": [8]}
LSTM = {"type": "lstm", "hidden_size": 8}
GOALS = {"type": "point_goal", "horizon": 7}


def make_spec(kind, encoder=MLP, tasks="cartpole", num_envs=6, network=None, **settings):
    parts = (
        tasks,
        {"type": "actor_critic", "encoder": encoder} | (network or {}),
        {"type": kind, "num_steps": 20} | settings,
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
    return Rollout.concatenate(trial).map(torch.from_numpy)


def corrected(learner, trial):
    algorithm = learner.algorithm
    return impala.with_vtrace(algorithm.policy, as_tensors(trial), algorithm.config)[0]


def older(trial, change):
    """The trial as if another policy had acted, whose log-probabilities differ by `change`."""
    return [replace(trial[0], log_prob=trial[0].log_prob + np.float32(change))]


CASES = {
    "mlp": dict(),
    "mlp_shared": dict(network={"separate_value": False}),
    "lstm": dict(encoder=LSTM),
    "box_cut_by_time": dict(tasks=GOALS),
    "lstm_box_cut_by_time": dict(encoder={"type": "gru", "hidden_size": 8}, tasks=GOALS),
}


@pytest.mark.parametrize("case", CASES)
def test_fresh_data_is_corrected_to_what_ppo_makes_of_it(case):
    same = dict(gae_lambda=0.9, num_steps=20)
    learner, trial = collected(make_spec("appo", **CASES[case], **same))
    new = corrected(learner, trial)
    ppo = build(make_spec("ppo", **CASES[case], **same)).algorithm
    ppo.policy.load_state_dict(learner.policy.state_dict())
    _, (old,) = collected(make_spec("ppo", **CASES[case], **same))
    for name in ("obs", "log_prob", "value_target", "advantage"):
        expected = torch.from_numpy(getattr(old, name))
        torch.testing.assert_close(getattr(new, name), expected, rtol=1e-4, atol=1e-5)
    assert (new.truncated.any() or new.terminated.any()).item()


def test_appo_of_fresh_data_is_ppo():
    weights = []
    for kind in ("appo", "ppo"):
        spec = make_spec(kind, gae_lambda=0.9, lr=1e-2)
        learner, trial = collected(spec)
        learner.update(0, 0, [trial])
        weights.append(learner.weights())
    for name, one in weights[0].items():
        np.testing.assert_allclose(one, weights[1][name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", ["mlp", "lstm", "lstm_box_cut_by_time"])
def test_values_and_probabilities_are_of_the_learners_policy_at_every_step(case):
    # After the policy moved: as the worker's would be, had it acted with the new weights.
    learner, trial = collected(make_spec("impala", **CASES[case]))
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator())
    new, policy = corrected(learner, trial), learner.policy
    rollout = as_tensors(trial)
    memory, done = rollout.initial_memory, rollout.terminated | rollout.truncated
    values, log_probs = [], []
    with torch.no_grad():
        for t in range(21):  # one step at a time
            reset = rollout.reset[t : t + 1] if t < 20 else done[-1:]
            pi, features, memory = policy(rollout.obs[t : t + 1], None, memory, reset)
            shared = policy.value_encoder is None
            value = policy.value(features if shared else None, rollout.obs[t : t + 1])
            values.append(policy.denormalize_value(value))
            if t < 20:
                log_probs.append(policy.policy_head.log_prob(pi[0], rollout.action[t]))
    torch.testing.assert_close(new.log_prob, torch.stack(log_probs), rtol=1e-4, atol=1e-5)
    # Backwards by hand in one column; a time limit alone is valued by the worker.
    value, gamma = torch.cat(values), 0.99
    ratio = (new.log_prob - rollout.log_prob).exp()
    for column in range(6):
        above = 0.0
        for t in reversed(range(20)):
            ended = bool(done[t, column])
            following = rollout.next_value[t, column] if ended else value[t + 1, column]
            error = rollout.reward[t, column] + gamma * following - value[t, column]
            weight = ratio[t, column].clamp_max(1.0)
            above = weight * (error + gamma * (0.0 if ended else above))
            expected = value[t, column] + above
            torch.testing.assert_close(new.value_target[t, column], expected, rtol=1e-3, atol=1e-3)


def test_actions_the_policy_has_left_behind_teach_it_less():
    # Half as likely now as then: rho = 1/2 where it was 1, if nothing comes after (lambda 0).
    learner, trial = collected(make_spec("impala", gae_lambda=0.0))
    fresh = corrected(learner, trial).advantage
    stale = corrected(learner, older(trial, math.log(2))).advantage
    torch.testing.assert_close(stale, fresh / 2)
    favoured = corrected(learner, older(trial, -math.log(2))).advantage
    torch.testing.assert_close(favoured, fresh)  # never more than rho_bar


def test_wider_bounds_let_the_policy_count_more_than_once():
    learner, trial = collected(make_spec("impala", gae_lambda=0.0, rho_bar=4.0))
    fresh = corrected(learner, trial).advantage
    favoured = corrected(learner, older(trial, -math.log(2))).advantage
    torch.testing.assert_close(favoured, 2 * fresh)


@pytest.mark.parametrize("encoder", [MLP, LSTM], ids=["mlp", "lstm"])
def test_impalas_gradient_is_the_weighted_policy_gradient(encoder):
    learner, trial = collected(make_spec("impala", encoder, value_coef=0.0, minibatches=1))
    trial = older(trial, np.linspace(-1, 1, 120).reshape(20, 6))
    algorithm, rollout = learner.algorithm, corrected(learner, trial)
    advantage = (rollout.advantage - rollout.advantage.mean()) / rollout.advantage.std()
    policy = algorithm.policy
    memory = tuple(leaf * ~rollout.reset[0].unsqueeze(-1) for leaf in rollout.initial_memory)
    reset = rollout.reset if memory else None
    pi, _, _ = policy(rollout.obs[:-1], None, memory, reset)
    loss = -(policy.policy_head.log_prob(pi, rollout.action) * advantage).mean()
    expected = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    got = first_gradient(algorithm, [as_tensors(trial)])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-6)


def test_impala_passes_over_a_batch_once():
    learner, trial = collected(make_spec("impala", minibatches=3))
    seen = []
    watched(learner.algorithm, lambda batch: seen.append(batch["advantage"].flatten()))
    learner.update(0, 0, [trial])
    assert len(seen) == 3
    assert torch.cat(seen).unique().numel() == 120


@pytest.mark.parametrize("kind", ["impala", "appo"])
def test_the_shares_of_several_learners_average_to_the_whole_gradient(kind):
    learner, trial = collected(make_spec(kind, LSTM, num_envs=5, minibatches=1))
    algorithm, rollout = learner.algorithm, as_tensors(older(trial, 0.3))
    whole, parts = first_gradient(algorithm, [rollout]), []
    for rank in range(2):  # of 5 columns, one learner has 3 and the other 2
        algorithm.rank, algorithm.world_size = rank, 2
        algorithm.rng = np.random.default_rng(0)
        parts.append(first_gradient(algorithm, [rollout]))
    for expected, one, other in zip(whole, *parts, strict=True):
        torch.testing.assert_close((one + other) / 2, expected, rtol=1e-4, atol=1e-6)


def test_the_age_of_the_data_is_reported():
    # Every action half as likely as it was: ratio - 1 - log ratio = 0.5 - 1 + log 2.
    learner, trial = collected(make_spec("impala"))
    fresh = learner.update(0, 0, [trial])["behaviour_kl"]
    assert fresh == pytest.approx(0, abs=1e-6)
    learner, trial = collected(make_spec("impala"))
    stale = learner.update(0, 0, [older(trial, math.log(2))])["behaviour_kl"]
    assert stale == pytest.approx(math.log(2) - 0.5, rel=1e-4)


LAGGED = """
tasks: cartpole
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: impala, num_steps: 10, lr: 1e-2}
rollout: {shards: 1, num_envs: 4}
workers: {num: 0}
learners: {threads: 1}
stages: {train: {type: pretrain, env_steps: 200, validation_tasks: 2, max_policy_lag: 1}}
"""


def test_a_lagged_run_acts_with_a_policy_one_update_old(tmp_path):
    config = parse_config(LAGGED, "lagged")
    metrics = load(controller.run(config, tmp_path / "run", display=Display(quiet=True)), "metrics")
    lag = metrics[metrics["name"] == "policy_lag"]["value"].tolist()
    assert lag == [0, 0, 1, 1, 1]
    age = metrics[metrics["name"] == "behaviour_kl"]["value"].tolist()
    assert age[:2] == pytest.approx([0, 0], abs=1e-6)
    assert min(age[2:]) > 1e-6


class Uncorrected(PPO):
    """Says nothing of old data."""

    corrects_for_lag = False


def test_old_data_is_refused_for_an_algorithm_that_does_not_correct():
    changes = ["algorithm=" + json.dumps({"type": f"{__name__}:Uncorrected"})]
    with pytest.raises(ConfigError, match=r"train: max_policy_lag: uncorrected .*; use 0"):
        controller.check(parse_config(LAGGED, "lagged", changes))
    controller.check(parse_config(LAGGED, "lagged", [*changes, "stages.train.max_policy_lag=0"]))


def final_return(kind, lag, iterations, **settings):
    """Of evaluation, after training with a policy some updates old."""
    encoder = {"type": "mlp", "hidden_sizes": [64, 64]}
    spec = make_spec(kind, encoder, num_envs=16, **settings)
    learner, worker, state, versions = Learner(spec), RolloutWorker(), {}, []
    for i in range(iterations):
        versions.append(learner.weights())
        weights = Weights(i, versions[max(0, i - lag)])
        _, trial, state = worker.collect(CollectCall(spec, 0, i, 0), weights, state)
        learner.update(i, 0, [trial])
    tasks = tuple(learner.algorithm.distribution.sample(np.random.default_rng(0), 32, "test"))
    call = EvaluateCall(spec, tasks, 0, 0, True, 0)
    return RolloutWorker().evaluate(call, Weights(0, learner.weights()))["return"].mean()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["impala", "appo"])
def test_old_data_balances_the_pole(kind):
    settings = {
        "impala": dict(num_steps=32, entropy_coef=0.01),
        "appo": dict(num_steps=128, lr=3e-3, gae_lambda=0.95),
    }
    iterations = {"impala": 600, "appo": 80}
    assert final_return(kind, 1, iterations[kind], **settings[kind]) > 400


def test_impalas_entropy_bonus_fades_as_ppos_does():
    losses = []
    for progress in (0.0, 1.0):
        learner, trial = collected(make_spec("impala", entropy_coef=0.1, anneal_entropy=True))
        learner.algorithm.progress = progress
        loss, report = first_loss(learner.algorithm, [as_tensors(trial)])
        losses.append(loss.item())
    assert losses[1] - losses[0] == pytest.approx(0.1 * report["entropy"].item(), rel=1e-3)
