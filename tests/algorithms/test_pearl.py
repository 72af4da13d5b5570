"""The posterior: a set of factors, the same in workers and learners, trained by the critics."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_sac import assert_resumes, assert_shares_average_to_the_whole, trained
from test_sac import make_spec as make_sac_spec

from dmrl_ray.algorithms.sac import draw_batch
from dmrl_ray.jobs.spec import Weights, build
from dmrl_ray.jobs.worker import EvaluateCall, RolloutWorker
from dmrl_ray.losses.latent import product_of_gaussians
from dmrl_ray.rollout.sampler import Sampler

HORIZON, EPISODES, LATENT = 6, 3, 2
POINTS = {"type": "point_goal", "horizon": HORIZON, "episodes": EPISODES}
GRID = {"type": "grid_nav", "episodes": EPISODES}


def make_spec(tasks=POINTS, kind="pearl", **settings):
    settings = {"latent": LATENT, "context_hidden_sizes": [8], "context_episodes": 2} | settings
    return make_sac_spec(kind, tasks, **settings)


def context():
    """20 transitions of one task: obs, action, reward (20, 1, ...)."""
    torch.manual_seed(0)
    return [torch.randn(20, 1, *shape) for shape in ((2,), (2,), ())]


def posterior_from(algorithm, seen):
    precision, weighted = (x[:, 0] for x in algorithm.factors(*seen))
    return product_of_gaussians(precision, weighted)


def playing(spec, episodes, num_envs=4):
    """An algorithm and its posteriors after some episodes, with the latents that were acted on."""
    program = build(spec)
    algorithm, latents = program.algorithm, []
    program.policy.register_forward_pre_hook(
        lambda _, args, given: latents.append(given["latent"][0].clone()), with_kwargs=True
    )
    sampler = Sampler(program.distribution, num_envs, memory_spans_trial=False)
    sampler.start(np.random.default_rng(0), 0)
    tasks = program.distribution.sample(np.random.default_rng(0), num_envs, "train")
    agent = algorithm.begin(sampler, tasks)
    trial = [r for n in episodes for r in algorithm.play(sampler, agent, n)]
    state = algorithm.adapt(agent.state, agent.unused.map(torch.as_tensor))
    return algorithm, (state.precision, state.weighted_mean), trial, torch.stack(latents)


def drawn(algorithm):
    return draw_batch(algorithm, algorithm.replay, algorithm.config)


def test_the_order_of_the_context_does_not_matter():
    algorithm = build(make_spec()).algorithm
    seen, order = context(), torch.randperm(20)
    shuffled = posterior_from(algorithm, [x[order] for x in seen])
    for one, other in zip(posterior_from(algorithm, seen), shuffled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_posterior_sharpens_with_every_transition():
    algorithm = build(make_spec()).algorithm
    seen = context()
    log_var = [posterior_from(algorithm, [x[:n] for x in seen])[1] for n in range(21)]
    assert not log_var[0].any()  # the prior
    assert all((later < sooner).all() for sooner, later in pairwise(log_var))


def test_a_latent_is_kept_for_an_episode_and_the_first_is_the_priors():
    _, _, _, latents = playing(make_spec(), [EPISODES])
    by_episode = latents.reshape(EPISODES, HORIZON, 4, LATENT)
    assert torch.equal(by_episode, by_episode[:, :1].expand_as(by_episode))
    assert by_episode[:, 0].unique(dim=0).shape[0] == EPISODES
    again = build(make_spec())
    sampler = Sampler(again.distribution, 4, memory_spans_trial=False)
    sampler.start(np.random.default_rng(0), 0)
    first = sampler.rng.standard_normal((4, LATENT), dtype=np.float32)
    torch.testing.assert_close(latents[0], torch.from_numpy(first))


def test_a_trial_played_in_parts_is_remembered_whole():
    whole, parts = (playing(make_spec(), n) for n in ([3], [2, 1]))
    for one, other in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole[3], parts[3])


@pytest.mark.parametrize(
    "variant", [{}, {"kind": "stepwise_pearl", "belief_steps": 4}], ids=["paper", "stepwise"]
)
def test_the_learner_has_the_posterior_of_the_worker(variant):
    algorithm, memory, trial, _ = playing(make_spec(**variant), [EPISODES])
    algorithm.replay.add([rollout.map(torch.from_numpy) for rollout in trial])
    steps = algorithm.replay.take(np.arange(4))
    factors = algorithm.factors(steps.obs, steps.action, steps.reward)
    for of_worker, of_learner in zip(memory, factors, strict=True):
        torch.testing.assert_close(of_worker, of_learner.sum(1))


def test_the_context_is_learned_from_the_critics_alone():
    algorithm = trained(make_spec(kl_weight=0.0))[0].algorithm
    calls, step = [], algorithm.step_optimizer

    def watching(loss, parts):
        encoder = list(algorithm.context_encoder.parameters())
        calls.append(torch.autograd.grad(loss, encoder, retain_graph=True, allow_unused=True))
        return step(loss, parts)

    algorithm.step_optimizer = watching
    algorithm.gradient_step()
    of_critics, of_actor, of_temperature = calls
    assert all(gradient.abs().sum() > 0 for gradient in of_critics)
    assert all(gradient is None for gradient in (*of_actor, *of_temperature))


def test_a_transition_has_the_posterior_of_a_beginning_of_its_own_trial():
    algorithm = trained(make_spec())[0].algorithm
    steps = algorithm.config.batch_steps
    batch = replace(drawn(algorithm), slots=np.array([2, 0]))
    algorithm.rng = np.random.default_rng(0)
    mean, log_var, _ = algorithm.posterior(batch)
    known = np.random.default_rng(0).integers(2 * HORIZON + 1, size=(2, steps))
    seen = algorithm.replay.take(batch.slots)
    for i, k in np.ndindex(2, steps):
        beginning = (x[i, : known[i, k], None] for x in (seen.obs, seen.action, seen.reward))
        expected = posterior_from(algorithm, beginning)
        found = mean[i, k], log_var[i, k]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "counts"), [(0, True), (2 * HORIZON, False)])
def test_only_the_context_episodes_are_context(first, counts):
    algorithm = trained(make_spec())[0].algorithm
    batch, means = drawn(algorithm), []
    for _ in range(2):
        algorithm.rng = np.random.default_rng(0)
        means.append(algorithm.posterior(batch)[0])
        algorithm.replay._arrays["reward"][:, first:] += 1.0
    assert torch.equal(*means) != counts


@pytest.mark.parametrize("tasks", [POINTS, GRID], ids=["continuous", "discrete"])
def test_a_learner_from_a_checkpoint_goes_on_bit_for_bit(tasks):
    assert_resumes(make_spec(tasks))


@pytest.mark.parametrize("tasks", [POINTS, GRID], ids=["continuous", "discrete"])
def test_the_shares_of_several_learners_average_to_the_whole_gradient(tasks):
    assert_shares_average_to_the_whole(trained(make_spec(tasks))[0].algorithm)


@pytest.mark.parametrize("tasks", [POINTS, "cartpole"], ids=["equal", "unequal"])
def test_adaptation_steps_are_the_episodes_of_a_trial(tasks):
    spec = make_spec(tasks, context_episodes=1)
    program = build(spec)
    tasks = tuple(program.distribution.sample(np.random.default_rng(0), 3, "test"))
    weights = Weights(0, {n: x.numpy() for n, x in program.policy.state_dict().items()})
    rows = RolloutWorker().evaluate(EvaluateCall(spec, tasks, 0, 0, True, 0), weights)
    episodes = program.distribution.episodes_per_trial
    assert sorted(rows["adaptation_step"]) == sorted(list(range(episodes)) * 3)


def test_more_context_episodes_than_a_trial_has_are_refused():
    with pytest.raises(ValueError, match=r"context_episodes: 4, but trials .* have 3"):
        build(make_spec(context_episodes=4))


@pytest.mark.slow
def test_pearl_goes_to_the_goal_in_the_episode_after_the_first():
    encoder = {"type": "mlp", "hidden_sizes": [64, 64]}
    spec = make_spec(
        {"type": "point_goal", "goal": "semicircle", "horizon": 20, "episodes": 2},
        encoder=encoder,
        num_envs=32,
        **dict(
            latent=3,
            context_episodes=1,
            context_hidden_sizes=[64, 64],
            critic_hidden_sizes=[64, 64],
        ),
        **dict(batch_trials=32, batch_steps=8, gradient_steps=32),
        **dict(gamma=0.9, lr=3e-3, reward_scale=10.0),
    )
    learner, _ = trained(spec, updates=75)
    goals = tuple(learner.algorithm.distribution.sample(np.random.default_rng(0), 50, "test"))
    call = EvaluateCall(spec, goals, 0, 0, True, 0)
    rows = RolloutWorker().evaluate(call, Weights(0, learner.weights()))
    first, second = (rows["score"][rows["adaptation_step"] == step].mean() for step in range(2))
    assert second > 0.5
    assert first < 0.4
