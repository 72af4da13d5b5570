"""Workers and learners adapt alike, and the outer gradient is the right one."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dmrl_ray.algorithms.maml import MAML
from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.envs.bandit import Bandit
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.learn.per_task import (
    inner_advantage,
    per_task,
    task_forward,
    task_log_prob,
    task_pi,
)
from dmrl_ray.losses.policy_gradient import likelihood_ratio_loss, ppo_clip_loss
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.base import Encoder
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout
from tests.algorithms.adaptation_cases import (
    COLUMNS,
    HORIZON,
    in_double,
    make_algorithm,
    numbers_of,
    one_trial,
    outer_gradient,
    outer_loss,
    pis,
    slope,
)

MLP = {"type": "mlp", "hidden_sizes": [3], "activation": "tanh"}
LSTM, GRU = ({"type": kind, "hidden_size": 2} for kind in ("lstm", "gru"))
CNN = {"type": "cnn", "channels": [2], "hidden_sizes": [4], "activation": "tanh"}


make_maml = partial(make_algorithm, "maml")


UNDISCOUNTED = {"outer_gamma": 1.0, "gae_lambda": 1.0}


def outer_advantages(maml, trial):
    """Of each rollout of a trial that continues."""
    return maml.outer_advantage(trial).split([rollout.num_steps for rollout in trial])


def adapted(maml, trial):
    return maml.adapted_params(trial)[-1]


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize(
    ("encoder", "tasks"),
    [(MLP, "point_goal"), (MLP, "bandit"), (LSTM, "point_goal"), (GRU, "bandit"), (CNN, "images")],
)
def test_the_learner_adapts_exactly_as_the_worker_did(inner_steps, encoder, tasks):
    # So that the importance ratio on the post-adaptation rollout is one in the first epoch.
    maml = make_maml(encoder, tasks, inner_steps=inner_steps)
    trial = one_trial(maml)
    assert len(trial) == inner_steps + 1
    assert_same_policies(maml, trial)


def assert_same_policies(maml, trial):
    """The learner's way through a trial ends, after every step, in the policies that acted."""
    for params, rollout in zip(maml.adapted_params(trial), trial, strict=True):
        log_prob = task_log_prob(maml.policy, params, rollout)
        torch.testing.assert_close(log_prob.flatten(1), rollout.log_prob)


def test_a_worker_and_a_learner_built_apart_adapt_alike():
    tasks, network, algorithm = (
        Component.model_validate(part)
        for part in (
            {"type": "point_goal", "horizon": 5},
            {"type": "actor_critic", "encoder": {"type": "mlp", "hidden_sizes": [8]}},
            {"type": "maml", "episodes_per_task": 2, "inner_steps": 2},
        )
    )
    spec = JobSpec("s", "s", 0, tasks, network, algorithm, RolloutSettings(num_envs=6))
    learner, workers = Learner(spec), (RolloutWorker(), RolloutWorker())
    weights = Weights(0, learner.weights())
    trials = [w.collect(CollectCall(spec, i, 0, 0), weights, {})[1] for i, w in enumerate(workers)]
    trial = [Rollout.concatenate(list(r)).map(torch.from_numpy) for r in zip(*trials, strict=True)]
    params = adapted(learner.algorithm, trial)
    log_prob = task_log_prob(learner.policy, params, trial[-1])
    torch.testing.assert_close(log_prob.flatten(1), trial[-1].log_prob)


@pytest.mark.parametrize("tasks", ["point_goal", "bandit"])
def test_the_batched_inner_step_equals_a_loop_over_tasks(tasks):
    maml = make_maml(tasks=tasks)
    support, _ = one_trial(maml)
    with torch.no_grad():  # as in later epochs: not the parameters that acted
        for parameter in maml.policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    params = maml.adapt(per_task(maml.policy, 3), support)
    actor = {k: p for k, p in maml.policy.named_parameters() if k in params}
    for i in range(3):
        mine = support.task_index == i
        pi, _, _ = maml.policy(support.obs[:-1, mine])
        log_prob = maml.policy.policy_head.log_prob(pi, support.action[:, mine])
        loss = likelihood_ratio_loss(
            log_prob, support.log_prob[:, mine], support.advantage[:, mine]
        )
        gradients = torch.autograd.grad(loss, list(actor.values()))
        for (name, parameter), gradient in zip(actor.items(), gradients, strict=True):
            stepped = parameter - maml.config.inner_lr * gradient
            torch.testing.assert_close(params[name][i], stepped, rtol=1e-4, atol=1e-6)


def test_an_inner_step_makes_the_good_actions_likelier():
    maml = make_maml(inner_lr=0.01)
    support, _ = one_trial(maml)
    before = task_log_prob(maml.policy, per_task(maml.policy, 3), support).flatten(1)
    after = task_log_prob(maml.policy, adapted(maml, [support, support]), support).flatten(1)
    gain = ((after - before) * support.advantage).reshape(HORIZON, 3, COLUMNS).mean((0, 2))
    assert (gain > 0).all()


def test_tasks_do_not_influence_each_others_adaptation():
    maml = make_maml()
    support, _ = one_trial(maml)
    params = adapted(maml, [support, support])
    support.advantage[:, support.task_index == 1] *= -3
    other = adapted(maml, [support, support])
    for name in params:
        torch.testing.assert_close(params[name][[0, 2]], other[name][[0, 2]])
        assert not torch.equal(params[name][1], other[name][1])


def test_anil_moves_the_head_alone():
    maml = make_maml(trainable=("policy_head",))
    trial = one_trial(maml)
    before, after = per_task(maml.policy, 3), adapted(maml, trial)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("policy_head.")}


def test_anil_with_every_part_is_maml():
    everything = make_maml(trainable=("encoder", "policy_head"))
    trial = one_trial(make_maml())
    for a, b in zip(
        adapted(make_maml(), trial).values(), adapted(everything, trial).values(), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_part_to_adapt_that_no_parameter_has_is_refused():
    with pytest.raises(ValueError, match=r"trainable.*'polcy_head'.*encoder, policy_head"):
        make_maml(trainable=("encoder", "polcy_head"))


def test_first_order_is_the_gradient_at_the_adapted_parameters():
    # FOMAML: the outer gradient with respect to the adapted parameters, moved to the initial ones.
    maml = make_maml(first_order=True)
    trial = one_trial(maml)
    gradient = outer_gradient(maml, trial)
    params = {n: p.detach().requires_grad_() for n, p in adapted(maml, trial).items()}
    maml.outer_loss([params] * 2, trial, maml.outer_advantage(trial)).mean().backward()
    for name in params:
        torch.testing.assert_close(gradient[name], params[name].grad.sum(0), rtol=1e-4, atol=1e-6)


def test_the_second_derivative_matters():
    first, full = (make_maml(first_order=order) for order in (True, False))
    trial = one_trial(full)
    one, other = outer_gradient(first, trial), outer_gradient(full, trial)
    name = "policy_head.layer.weight"
    assert (one[name] - other[name]).norm() > 0.01 * other[name].norm()


def test_without_an_inner_step_worth_the_name_maml_is_the_plain_policy_gradient():
    maml = make_maml(inner_lr=1e-12)
    trial = one_trial(maml)
    query = trial[-1]
    gradient = outer_gradient(maml, trial)
    maml.policy.zero_grad()
    log_prob = maml.policy.policy_head.log_prob(maml.policy(query.obs[:-1])[0], query.action)
    likelihood_ratio_loss(log_prob, query.log_prob, query.advantage).backward()
    for name, parameter in maml.policy.named_parameters():
        if name in gradient:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "settings"),
    [
        (MLP, {}),
        (MLP, {"inner_steps": 2}),
        (MLP, {"outer": "vpg"}),
        (MLP, {"steps_per_adaptation": 2}),
        (LSTM, {}),
        (GRU, {}),
    ],
)
def test_the_outer_gradient_equals_finite_differences(encoder, settings):
    maml = make_maml(encoder, **settings)
    trial = in_double(maml, one_trial(maml, num_tasks=2))
    gradient = outer_gradient(maml, trial)
    for name, i, flat in numbers_of(maml.policy, gradient):
        expected = slope(lambda: outer_loss(maml, trial).item(), flat, i)
        assert gradient[name].view(-1)[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


class Counter(Encoder):
    """An encoder with a memory that nobody knows how to differentiate twice."""

    out_dim = 1

    def __init__(self, config, obs_space, extra):
        super().__init__()

    def initial_memory(self, num):
        return (torch.zeros(num, 1),)

    def forward(self, obs, extra, memory, reset):
        return obs[..., :1], memory


def test_an_encoder_with_memory_is_refused_unless_it_is_known_to_adapt():
    with pytest.raises(ValueError, match=r"network\.encoder.*counter.*an lstm or a gru"):
        make_maml({"type": f"{__name__}:Counter"})


def test_within_a_trial_all_of_it_scales_the_observations():
    maml = make_maml(tasks="bandit", steps_per_adaptation=2)
    trial = one_trial(maml)
    maml.update(trial)
    seen = torch.cat([rollout.obs[:-1] for rollout in trial])
    torch.testing.assert_close(maml.policy.obs_norm.mean, seen.mean((0, 1)))


@pytest.mark.parametrize("encoder", [LSTM, GRU], ids=lambda encoder: encoder["type"])
def test_a_memory_is_carried_through_an_episode_and_emptied_at_its_end(encoder):
    maml = make_maml(encoder)
    support, query = one_trial(maml)
    for rollout in (support, query):
        assert rollout.reset[0].all()
        assert not rollout.reset[1:].any()
    params = per_task(maml.policy, 3)
    whole = task_pi(maml.policy, params, support)
    memory, parts = maml.policy.initial_memory(12), []
    for t in range(HORIZON):
        obs = support.obs[t : t + 1]
        emptied, _ = task_forward(maml.policy, params, obs, None, memory, support.reset[:1])
        pi, memory = task_forward(maml.policy, params, obs, None, memory, None)
        assert torch.equal(pi, emptied) == (t == 0)
        parts.append(pi)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_within_a_trial_the_episode_goes_on_over_the_gradient_steps():
    maml = make_maml(tasks="bandit", steps_per_adaptation=4, episodes_per_task=2)
    sampler = Sampler(maml.distribution, 6, memory_spans_trial=False)
    sampler.start(np.random.default_rng(0), 0)
    tasks = maml.distribution.sample(np.random.default_rng(0), 3, "train")
    trial = maml.collect(sampler, tasks)
    rows = sampler.take_episodes()
    assert [rollout.num_steps for rollout in trial] == [4, HORIZON - 4]
    rewards = sum(rollout.reward.sum(0) for rollout in trial)
    np.testing.assert_allclose(rows["return"], rewards)
    assert rows["length"].tolist() == [HORIZON] * 6
    assert rows["adaptation_step"].tolist() == [0] * 6


def test_a_memory_goes_on_over_the_gradient_steps_of_a_trial():
    maml = make_maml(LSTM, "bandit", steps_per_adaptation=2)
    trial = one_trial(maml)
    assert trial[0].reset[0].all()
    assert not any(rollout.reset.any() for rollout in trial[1:])
    assert_same_policies(maml, trial)


class ShuffledMAML(MAML):
    """Adapts to advantages that have nothing to do with the actions."""

    def adapt(self, state, rollout, *, create_graph=False):
        order = torch.from_numpy(np.random.default_rng(0).permutation(rollout.advantage.numel()))
        shuffled = rollout.advantage.flatten()[order].reshape(rollout.advantage.shape)
        shuffled = replace(rollout, advantage=shuffled)
        return super().adapt(state, shuffled, create_graph=create_graph)


def late_rewards(kind):
    """Mean reward of the last 10 of 100 pulls, with a gradient step every 10."""
    family = Bandit(Bandit.Config(arms=5, pulls=100))
    settings = kind.Config(episodes_per_task=1, steps_per_adaptation=10, gamma=0.0, inner_lr=8.0)
    torch.manual_seed(0)
    network = ActorCritic.Config.model_validate({"encoder": {"type": "mlp", "hidden_sizes": [16]}})
    spaces = family.observation_space, family.action_space
    maml = kind(settings, family, ActorCritic(network, *spaces, sees_previous=False))
    return one_trial(maml, num_tasks=300)[-1].reward.mean().item()


def test_gradient_steps_find_a_better_arm_unless_rewards_are_shuffled():
    # Of 5 arms with uniform chances, any one pays 0.5 and the best 5/6 on average.
    assert late_rewards(MAML) > 0.75
    assert late_rewards(ShuffledMAML) == pytest.approx(0.5, abs=0.05)


def test_within_a_trial_every_rollout_counts():
    maml = make_maml(tasks="bandit", steps_per_adaptation=2, outer_gamma=0.9, gae_lambda=0.5)
    trial = one_trial(maml)
    moved = [{n: p + 0.05 for n, p in params.items()} for params in maml.adapted_params(trial)]
    whole = maml.outer_loss(moved, trial, maml.outer_advantage(trial)).mean()
    parts = []
    for params, rollout, advantage in zip(moved, trial, outer_advantages(maml, trial), strict=True):
        log_prob = task_log_prob(maml.policy, params, rollout).flatten(1)
        parts.append(ppo_clip_loss(log_prob, rollout.log_prob, advantage, clip=0.3))
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def cut_trial(maml, played=((2, 4, 6), (6, 6, 6), (1, 1, 3))):
    """A trial whose first three columns of each task play so many steps, and the others none."""
    trial = one_trial(maml)
    last = torch.zeros(len(played), COLUMNS)
    last[:, :3] = torch.tensor(played)
    start = 0
    for i, rollout in enumerate(trial):
        steps = torch.arange(start, start + rollout.num_steps).unsqueeze(1)
        trial[i] = replace(rollout, mask=steps < last.flatten(), all_count=False)
        start += rollout.num_steps
    return trial


@pytest.mark.parametrize("outer", ["clip", "vpg"])
def test_a_step_weighs_the_same_wherever_a_trial_was_cut_and_tasks_count_alike(outer):
    maml = make_maml(tasks="bandit", steps_per_adaptation=4, outer=outer)  # pieces of 4 and of 2
    params = maml.adapted_params(one_trial(maml))  # under which every ratio is one
    for trial, counts in ((one_trial(maml), (24, 24, 24)), (cut_trial(maml), (12, 18, 5))):
        advantages = [torch.ones(r.reward.shape, requires_grad=True) for r in trial]
        loss = maml.outer_loss(params, trial, torch.cat(advantages)).mean()
        weight = -torch.cat(torch.autograd.grad(loss, advantages)).unflatten(1, (3, COLUMNS))
        mask = torch.cat([r.mask for r in trial]).unflatten(1, (3, COLUMNS))
        each = 1 / (3 * torch.tensor(counts)).reshape(1, 3, 1)
        torch.testing.assert_close(weight, mask * each)


def test_a_trust_region_is_measured_over_all_steps_of_a_trial():
    maml = make_maml(tasks="bandit", steps_per_adaptation=4, outer="trpo")
    trial = cut_trial(maml)
    before = [pi.detach() for pi in pis(maml, maml.adapted_params(trial), trial)]
    maml.policy.update_obs_norm = lambda *_: None  # they move policies too
    metrics = maml.update(trial)
    after = pis(maml, maml.adapted_params(trial), trial)
    kl = torch.cat([maml.policy.policy_head.kl(*pair) for pair in zip(before, after, strict=True)])
    counted = torch.cat([r.mask for r in trial])
    assert metrics["kl"] == pytest.approx(kl.flatten(1)[counted].mean().item(), rel=1e-4)
    assert metrics["kl"] > 0


def test_a_mean_return_is_of_the_environments_that_still_played():
    maml = make_maml(tasks="bandit", steps_per_adaptation=4)
    first, last = cut_trial(maml)
    first.reward[:] = last.reward[:] = 1.0
    # Nine columns play 2, 4, 4; 4, 4, 4; 1, 1, 3 of the first four steps, four the last two.
    assert first.mean_return() == pytest.approx(27 / 9)
    assert last.mean_return() == pytest.approx(2.0)
    assert last.map(torch.Tensor.numpy).fully_masked().mean_return() == 0.0


def rewarded(rewards):
    """Two rollouts of a trial in whose environments every step has these rewards."""
    maml = make_maml(tasks="bandit", steps_per_adaptation=3, **UNDISCOUNTED)
    trial = one_trial(maml, num_tasks=len(rewards) // COLUMNS)
    for rollout in trial:
        rollout.reward[:] = torch.tensor(rewards)
    return maml, trial


def test_how_good_a_task_is_explains_what_its_trials_return():
    # Left to explain are the first steps, before which nothing was rewarded.
    first, second = outer_advantages(*rewarded([0.0, 1.0, 0.3, 0.6] * 2))
    assert second.abs().max() < 0.2 * first[0].abs().max()


def test_a_late_reward_is_credited_to_the_steps_before_it_in_all_rollouts():
    maml, trial = rewarded([0.5] * 8)
    before = outer_advantages(maml, trial)
    trial[1].reward[-1, 3] += 1
    after = outer_advantages(maml, trial)
    for rollout in range(2):
        others = [b for b in range(8) if b != 3]
        gain = after[rollout] - before[rollout]
        assert (gain[:, 3] > gain[:, others].max(1).values).all()


def test_a_trial_without_room_for_a_gradient_step_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.steps_per_adaptation.*6 steps.*trial of 6"):
        make_maml(tasks="bandit", steps_per_adaptation=HORIZON)


@pytest.mark.parametrize(
    "options", [{}, {"tasks": "bandit", "steps_per_adaptation": 2}], ids=["episodes", "within"]
)
def test_the_shares_of_several_learners_average_to_the_whole_gradient(options):
    maml = make_maml(**options)
    trial = one_trial(maml)
    whole = outer_gradient(maml, trial)
    parts = []
    for rank in range(2):  # 3 tasks: one learner has two of them, the other one
        maml.rank, maml.world_size = rank, 2
        parts.append(outer_gradient(maml, trial))
    for name in whole:
        average = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(average, whole[name], rtol=1e-4, atol=1e-7)


def test_a_learner_without_a_task_adds_nothing_to_the_gradient():
    maml = make_maml()
    trial = one_trial(maml, num_tasks=1)
    maml.rank, maml.world_size = 0, 2
    assert all((g == 0).all() for g in outer_gradient(maml, trial).values())


def test_the_first_epoch_is_a_step_of_the_outer_loss_with_ratio_one():
    # At ratio one the clipped loss is minus the mean advantage, which is standardised to zero.
    maml = make_maml(epochs=1)
    metrics = maml.update(one_trial(maml))
    assert metrics["outer_loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["grad_norm"] > 1e-3


def test_the_outer_loss_is_ppos_over_all_tasks():
    maml = make_maml()
    trial = one_trial(maml)
    params, query = adapted(maml, trial), trial[-1]
    with torch.no_grad():
        params = {name: p + 0.05 * torch.randn_like(p) for name, p in params.items()}
    log_prob = task_log_prob(maml.policy, params, query).flatten(1)
    expected = ppo_clip_loss(log_prob, query.log_prob, query.advantage, clip=0.3)
    found = maml.outer_loss([params] * 2, trial, query.advantage).mean()
    torch.testing.assert_close(found, expected)


def test_a_frozen_encoder_still_adapts_within_a_trial():
    # `trainable` freezes what the outer loop moves; what the inner loop moves is `adapt`.
    maml = make_maml()
    trial = one_trial(maml)
    maml.prepare_training(("policy_head",))
    weights = {n: p.detach().clone() for n, p in maml.policy.named_parameters()}
    maml.update(trial)
    for name, parameter in maml.policy.named_parameters():
        assert torch.equal(weights[name], parameter) != name.startswith("policy_head."), name


def test_an_advantage_that_is_not_a_number_leaves_policy_and_norms_as_they_are():
    maml = make_maml(epochs=2)
    trial = one_trial(maml)
    trial[-1].advantage[0, 0] = torch.nan
    before = {name: array.clone() for name, array in maml.policy.state_dict().items()}
    maml.update(trial)
    assert maml.skipped_batches == 2
    for name, array in maml.policy.state_dict().items():
        torch.testing.assert_close(array, before[name], rtol=0, atol=0)


def test_fitted_advantages_are_standardised_per_task():
    maml = make_maml(gae_lambda=0.5)  # at 1 they have no mean to begin with
    support, _ = one_trial(maml)
    by_task = support.advantage.reshape(HORIZON, 3, COLUMNS)
    torch.testing.assert_close(by_task.mean((0, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_task.std((0, 2)), torch.ones(3))


def test_the_scale_of_one_tasks_rewards_does_not_change_the_advantages():
    maml = make_maml()
    rollout = one_trial(maml)[0].map(lambda x: x.numpy())
    before = inner_advantage([rollout], 3, gamma=0.99, gae_lambda=1.0)
    rollout.reward[:, rollout.task_index == 1] *= 8
    after = inner_advantage([rollout], 3, gamma=0.99, gae_lambda=1.0)
    np.testing.assert_allclose(before, after, rtol=1e-3, atol=1e-4)


def part_of(rollout, steps):
    names = ("reward", "terminated", "truncated")
    obs = rollout.obs[:-1][steps]
    return replace(
        rollout,
        obs=np.concatenate([obs, obs[-1:]]),
        **{name: getattr(rollout, name)[steps] for name in names},
    )


def test_advantages_within_a_trial_are_those_of_its_last_steps_in_the_light_of_all():
    maml = make_maml()
    rollout = one_trial(maml)[0].map(lambda x: x.numpy())
    whole = inner_advantage([rollout], 3, gamma=0.0, gae_lambda=1.0)
    parts = [part_of(rollout, slice(0, 4)), part_of(rollout, slice(4, None))]
    last = inner_advantage(parts, 3, gamma=0.0, gae_lambda=1.0)
    np.testing.assert_allclose(last, whole[4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [310, 500, 600])
def test_advantages_do_not_depend_on_where_a_rollout_was_cut(steps):
    # Every step is worth 1 in episodes of 300 steps: means over 100 steps are what a cubic in time
    # misses, at most 0.43 without a cut (600); with returns that end at the cut, 4.7 and 1.5.
    maml = make_maml()
    small = one_trial(maml)[0].map(lambda x: x.numpy())
    shape = (steps, 20)
    reward = 1 + 0.1 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    truncated = np.zeros(shape, np.bool_)
    truncated[299::300] = True
    rollout = replace(
        small,
        obs=np.zeros((steps + 1, 20, 1), np.float32),
        reward=reward,
        terminated=np.zeros(shape, np.bool_),
        truncated=truncated,
        mask=np.ones(shape, np.bool_),
    )
    advantage = inner_advantage([rollout], 1, gamma=0.99, gae_lambda=1.0)
    assert max(abs(advantage[i : i + 100].mean()) for i in range(0, steps, 100)) < 0.7


def test_pixels_are_no_features_of_the_baseline():
    maml = make_maml(CNN, "images")
    rollout = one_trial(maml)[0].map(lambda x: x.numpy())
    before = inner_advantage([rollout], 3, gamma=0.99, gae_lambda=1.0)
    rollout.obs[:] = 255 - rollout.obs
    after = inner_advantage([rollout], 3, gamma=0.99, gae_lambda=1.0)
    np.testing.assert_array_equal(before, after)


@pytest.fixture(scope="module")
def trained_on_goals():
    parts = (
        {"type": "point_goal", "horizon": 20},
        {"type": "actor_critic", "encoder": {"type": "mlp", "hidden_sizes": [64, 64]}},
        {"type": "maml", "episodes_per_task": 20, "evaluation_steps": 1},
    )
    parts = (Component.model_validate(part) for part in parts)
    spec = JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=400))
    learner, worker = Learner(spec), RolloutWorker()
    for i in range(120):
        weights = Weights(i, learner.weights())
        _, trial, _ = worker.collect(CollectCall(spec, 0, i, 0), weights, {})
        learner.update(i, 0, [trial])
    return learner


def returns_before_and_after(learner, kind):
    """On 30 held-out goals, with one gradient step between."""
    algorithm = learner.algorithm
    maml = kind(algorithm.config, algorithm.distribution, learner.policy)
    sampler = Sampler(maml.distribution, 600, memory_spans_trial=False)
    sampler.start(np.random.default_rng(1), 0)
    agent = maml.begin(sampler, maml.distribution.sample(np.random.default_rng(5), 30, "test"))
    list(maml.play(sampler, agent, 2))
    rows = sampler.take_episodes()
    return [rows["return"][rows["adaptation_step"] == step].mean() for step in range(2)]


@pytest.mark.slow
def test_maml_learns_to_adapt_to_held_out_goals(trained_on_goals):
    before, after = returns_before_and_after(trained_on_goals, MAML)
    assert after > before + 2


@pytest.mark.slow
def test_shuffled_advantages_do_not_help_to_adapt(trained_on_goals):
    before, after = returns_before_and_after(trained_on_goals, ShuffledMAML)
    assert after < before + 0.3
