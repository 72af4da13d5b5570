"""The policy acts on a belief that a bound on whole trials moves, and returns do not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmrl_ray.algorithms.ppo import ppo_batch, ppo_loss
from dmrl_ray.algorithms.varibad import elbo_loss, previous_of
from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.data.replay import ReplayBuffer
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, EvaluateCall, RolloutWorker
from dmrl_ray.networks.actor_critic import previous_inputs
from dmrl_ray.types import Rollout
from tests.learn.first_gradient import first_loss

GRID = {"type": "grid_nav", "episodes": 2}
WALK = {"type": "point_goal", "horizon": 5, "episodes": 2}
HEADS = {"rewards": "binary", "heads": "next_obs"}
OF_BELIEF = ("encoder.history.", "encoder.gaussian.", "auxiliary.")


def make_spec(tasks=GRID, num_envs=8, algorithm="varibad", encoder=None, network=None, **settings):
    encoder = {"type": "belief", "history": {"type": "gru", "hidden_size": 8}} | (encoder or {})
    if algorithm == "varibad" and settings.get("belief_updates") != 0:
        settings = {"replay_trials": 12, "belief_trials": 6} | settings
    parts = (
        tasks,
        {"type": "actor_critic", "encoder": encoder, "normalize_obs": False} | (network or {}),
        {"type": algorithm} | settings,
    )
    parts = (Component.model_validate(part) for part in parts)
    return JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=num_envs))


def collect(learner, index=0):
    call = CollectCall(learner.spec, 0, index, 0)
    return RolloutWorker().collect(call, Weights(index, learner.weights()), {})[1]


def tensors(trial):
    return [Rollout.concatenate([rollout]).map(torch.from_numpy) for rollout in trial]


def stored(learner, num_envs=8):
    """Everything of one collection, as a batch of the bound."""
    replay = ReplayBuffer(num_envs)
    replay.add(tensors(collect(learner)))
    return replay.take(np.arange(num_envs))


def bound(learner, trials, at):
    noise = np.random.default_rng(0).standard_normal((len(at), len(trials.reward), 5))
    weight = learner.algorithm.config.kl_weight
    noise = noise.astype(np.float32)
    return elbo_loss(learner.policy, trials, np.array(at), noise, kl_weight=weight)


def moved(learner, before):
    return {name for name, x in learner.weights().items() if not np.array_equal(x, before[name])}


def parameters(learner):
    return {name for name, _ in learner.policy.named_parameters()}


def test_without_a_bound_and_without_detaching_it_is_rl2():
    # The same seed makes the same policy; the same trials must make the same update of it.
    same = {"lr": 1e-3, "encoder": {"detach": False}}
    ours = Learner(make_spec(belief_updates=0, **same))
    theirs = Learner(make_spec(algorithm="rl2", **same))
    for version in range(2):
        trial = collect(theirs, version)
        ours.update(version, 0, [trial])
        theirs.update(version, 0, [trial])
    assert ours.get_state().keys() == theirs.get_state().keys()
    for name, array in theirs.get_state().items():
        np.testing.assert_array_equal(ours.get_state()[name], array, name)


@pytest.mark.parametrize("belief_updates", [0, 2])
def test_returns_leave_the_belief_alone_and_the_bound_moves_it_alone(belief_updates):
    learner = Learner(make_spec(belief_updates=belief_updates))
    before, trial = learner.weights(), collect(learner)
    if belief_updates:
        learner.algorithm.replay.add(tensors(trial))
        learner.algorithm.update_belief()
        belief = {name for name in parameters(learner) if name.startswith(OF_BELIEF)}
        assert moved(learner, before) == belief
    else:
        learner.update(0, 0, [trial])
        changed = moved(learner, before)
        assert not {name for name in changed if name.startswith(OF_BELIEF)}
        assert {"policy_head.layer.weight", "encoder.layers.0.weight"} <= changed


def test_beliefs_computed_once_an_update_are_those_acted_on():
    learner = Learner(make_spec(epochs=1, minibatches=1))
    metrics = learner.update(0, 0, [collect(learner)])
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)


def test_the_gradient_with_beliefs_computed_once_is_that_of_the_whole_policy():
    learner = Learner(make_spec(epochs=1, minibatches=1))
    algorithm, (rollout,) = learner.algorithm, tensors(collect(learner))
    once, _ = first_loss(algorithm, [rollout])
    batch = ppo_batch(learner.policy, rollout, 0.0)
    whole, _ = ppo_loss(learner.policy, batch, clip=0.2, value_coef=0.5)
    torch.testing.assert_close(once, whole)
    heads = [*algorithm.encoder.layers.parameters(), *learner.policy.policy_head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(once, heads), torch.autograd.grad(whole, heads))


def test_stored_trials_give_the_encoder_what_the_policy_observed():
    learner = Learner(make_spec(WALK))
    (rollout,) = tensors(collect(learner))
    replay = ReplayBuffer(8)
    replay.add([rollout])
    trials = {k: x.transpose(0, 1) for k, x in vars(replay.take(np.arange(8))).items()}
    for ours, theirs in zip(previous_of(trials), previous_inputs(rollout), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_bound_by_hand():
    # A belief that is N(1, 1) whatever happens costs 1/2 for each of 5 dimensions at the first of
    # 30 steps; a decoder that predicts 0 loses ln 2 on each of 30 rewards.
    learner = Learner(make_spec(decoder=HEADS, kl_weight=0.3))
    encoder, decoder = learner.algorithm.encoder, learner.policy.auxiliary["decoder"]
    with torch.no_grad():
        for parameter in (*encoder.gaussian.parameters(), *decoder.parameters()):
            parameter.zero_()
        encoder.gaussian.bias[:5] = 1.0
    loss, parts = bound(learner, stored(learner), [0, 7, 29])
    assert parts["belief_kl"].item() == pytest.approx(2.5 / 30)
    assert parts["reward_loss"].item() == pytest.approx(30 * np.log(2))
    assert loss.item() == pytest.approx(30 * np.log(2) + 0.3 * 2.5 / 30)


def test_an_early_belief_predicts_late_rewards_and_a_late_one_early_rewards():
    learner = Learner(make_spec())
    trials = stored(learner)
    for asked, step in ((0, 29), (29, 0)):
        before, _ = bound(learner, trials, [asked])
        trials.reward[:, step] += 3.0
        after, _ = bound(learner, trials, [asked])
        trials.reward[:, step] -= 3.0
        assert abs((after - before).item()) > 0.1


def test_a_prediction_is_made_from_the_belief_of_its_step():
    # What is seen at the last step is known to no earlier belief.
    learner = Learner(make_spec(decoder=HEADS, kl_weight=0.0))
    trials = stored(learner)
    before = {t: bound(learner, trials, [t])[0] for t in (5, 29)}
    trials.obs[:, 29] += 1.0
    assert torch.equal(bound(learner, trials, [5])[0], before[5])
    assert not torch.equal(bound(learner, trials, [29])[0], before[29])


def test_each_reward_is_predicted_by_the_head_of_the_cell_that_gave_it():
    # Heads that say "one half" are pushed by 1/2 for every visit, and by -1 for every find; the
    # last step of an episode ends on its true successor, not where the next episode begins.
    learner = Learner(make_spec(decoder=HEADS))
    decoder, trials = learner.policy.auxiliary["decoder"], stored(learner)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    bound(learner, trials, [3, 4])[0].backward()
    cell, found = trials.next_obs.argmax(-1), trials.reward > 0
    assert (cell[:, 14] != 0).any()
    visits, finds = (torch.bincount(c.flatten(), minlength=25) for c in (cell, cell[found]))
    torch.testing.assert_close(decoder.reward.layers[-1].bias.grad, (0.5 * visits - finds) / 8)


@pytest.mark.parametrize(
    ("tasks", "decoder"),
    [
        (GRID, HEADS),
        (WALK, {}),
        (WALK, {"decode_obs": True}),
        ({"type": "bandit"}, {"heads": "action"}),
    ],
)
def test_the_bound_improves_on_the_trials_it_is_taken_on(tasks, decoder):
    learner = Learner(make_spec(tasks, decoder=decoder, belief_lr=1e-2, belief_updates=30))
    trials = stored(learner)
    steps = list(range(trials.reward.shape[1]))
    before, _ = bound(learner, trials, steps)
    learner.algorithm.replay.add(tensors(collect(learner)))
    for _ in range(30):
        learner.algorithm.update_belief()
    after, _ = bound(learner, trials, steps)
    assert after.item() < 0.8 * before.item()


@pytest.mark.parametrize("detach", [True, False])
def test_going_on_from_a_state_equals_not_having_stopped(detach):
    spec = make_spec(encoder={"detach": detach}, beliefs_per_trial=4)
    steady, resumed = Learner(spec), Learner(spec)
    for version in range(2):  # The ring has wrapped.
        steady.update(version, 0, [collect(steady, version)])
    resumed.set_state(steady.get_state())
    trial = collect(steady, 2)
    for learner in (steady, resumed):
        learner.update(2, 0, [trial])
    for name, array in steady.get_state().items():
        np.testing.assert_array_equal(resumed.get_state()[name], array, name)


def test_the_next_update_depends_on_stored_trials():
    spec = make_spec()
    steady, forgetful = Learner(spec), Learner(spec)
    for version in range(2):
        steady.update(version, 0, [collect(steady, version)])
    state = {k: v for k, v in steady.get_state().items() if not k.startswith("algorithm.")}
    forgetful.set_state(state)
    trial = collect(steady, 2)
    for learner in (steady, forgetful):
        learner.update(2, 0, [trial])
    assert moved(forgetful, steady.weights())


def test_the_shares_of_two_learners_add_up_to_the_whole():
    spec = make_spec(decoder=HEADS, belief_updates=1, epochs=1, optimizer="sgd", max_grad_norm=1e9)
    gradients = []
    for world_size in (1, 2):
        parts = []
        for rank in range(world_size):
            learner = Learner(spec)
            algorithm = learner.algorithm
            algorithm.replay.add(tensors(collect(learner)))
            algorithm.rank, algorithm.world_size = rank, world_size
            algorithm.average_gradients = lambda mine, parts=parts: parts.append(mine) or mine
            algorithm.update_belief()
        gradients.append(torch.stack(parts).mean(0))
    torch.testing.assert_close(*gradients)


def test_parts_that_are_frozen_keep_still():
    learner = Learner(make_spec())
    learner.algorithm.prepare_training(("policy_head", "value_head"))
    before = learner.weights()
    learner.update(0, 0, [collect(learner)])
    changed = moved(learner, before) & parameters(learner)
    assert changed
    assert all(name.startswith(("policy_head", "value_head")) for name in changed)


def test_each_part_has_its_own_step_size():
    algorithm = Learner(make_spec(lr=0.5, belief_lr=0.25)).algorithm
    assert algorithm.learning_rate("encoder.history.cell.weight_ih_l0") == 0.25
    assert algorithm.learning_rate("auxiliary.decoder.reward.of_step.bias") == 0.25
    assert algorithm.learning_rate("encoder.layers.0.weight") == 0.5


def test_a_belief_that_returns_move_too_has_the_step_size_of_the_policy():
    algorithm = Learner(make_spec(lr=0.5, belief_lr=0.25, encoder={"detach": False})).algorithm
    assert algorithm.learning_rate("encoder.history.cell.weight_ih_l0") == 0.5
    assert algorithm.learning_rate("auxiliary.decoder.reward.of_step.bias") == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"encoder": "gru"}}, r"network\.encoder: varibad .* use belief"),
        ({"network": {"separate_value": True}}, r"network\.separate_value: "),
        (
            {"network": {"normalize_obs": True}, "decoder": HEADS},
            r"algorithm\.decoder\.heads: .* set network\.normalize_obs to false",
        ),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Learner(make_spec(**changes))


@pytest.mark.slow
def test_varibad_searches_the_grid_better_than_it_began():
    # Random moves give -1.2 an episode; the best are 4.0 in the first, 11.1 in the second.
    spec = make_spec(
        num_envs=128,
        encoder={"history": {"type": "gru", "hidden_size": 64}, "latent": 10},
        decoder=HEADS,
        lr=3e-3,
        belief_lr=1e-2,
        gamma=0.95,
        gae_lambda=0.9,
        entropy_coef=0.03,
        replay_trials=1000,
        belief_trials=25,
        belief_updates=10,
    )
    tasks = tuple(
        Learner(spec).algorithm.distribution.sample(np.random.default_rng(1), 512, "test")
    )
    returns = []
    for seed in range(3):  # The second episode of a single one is anything from 2.5 to 7.
        learner = Learner(replace(spec, seed=seed))
        for version in range(120):
            learner.update(version, 0, [collect(learner, version)])
        rows = RolloutWorker().evaluate(
            EvaluateCall(learner.spec, tasks, 0, 0, True, 0), Weights(0, learner.weights())
        )
        returns.append([rows["return"][rows["adaptation_step"] == step].mean() for step in (0, 1)])
    first, second = np.median(returns, 0)
    assert first > 2.5
    assert second > 4.5
