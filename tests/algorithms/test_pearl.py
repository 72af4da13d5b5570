"""The belief: a set of factors, the same in workers and learners, trained by the critics alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_sac import assert_resumes, assert_shares_average_to_the_whole, trained
from test_sac import make_spec as make_sac_spec

from dmrl_ray.jobs.spec import Weights, build
from dmrl_ray.jobs.worker import EvaluateCall, RolloutWorker
from dmrl_ray.losses.latent import gaussian_sample, product_of_gaussians
from dmrl_ray.rollout.sampler import Sampler

HORIZON, EPISODES, LATENT = 6, 3, 2
POINTS = {"type": "point_goal", "horizon": HORIZON, "episodes": EPISODES}
GRID = {"type": "grid_nav", "episodes": EPISODES}


def make_spec(tasks=POINTS, **settings):
    settings = {"latent": LATENT, "context_hidden_sizes": [8], "context_episodes": 2} | settings
    return make_sac_spec("pearl", tasks, **settings)


def context():
    """20 transitions of one task: obs, action, reward (20, 1, ...)."""
    torch.manual_seed(0)
    return [torch.randn(20, 1, *shape) for shape in ((2,), (2,), ())]


def belief_from(algorithm, seen):
    precision, weighted = (x[:, 0] for x in algorithm.factors(*seen))
    return product_of_gaussians(precision, weighted)


def playing(spec, episodes, columns=4):
    """An algorithm and its beliefs after some episodes, with the latents that were acted on."""
    program = build(spec)
    algorithm, latents, act = program.algorithm, [], program.algorithm._act

    def watching(latent, *inputs):
        latents.append(latent[0].clone())
        return act(latent, *inputs)

    algorithm._act = watching
    sampler = Sampler(program.distribution, columns, memory_spans_trial=False)
    sampler.start(np.random.default_rng(0), 0)
    tasks = program.distribution.sample(np.random.default_rng(0), columns, "train")
    agent = algorithm.begin(sampler, tasks)
    trial = [r for n in episodes for r in algorithm.play(sampler, agent, n)]
    state = algorithm.adapt(agent.state, agent.unused.map(torch.as_tensor))
    return algorithm, (state.precision, state.weighted_mean), trial, torch.stack(latents)


def test_the_order_of_the_context_does_not_matter():
    algorithm = build(make_spec()).algorithm
    seen, order = context(), torch.randperm(20)
    shuffled = belief_from(algorithm, [x[order] for x in seen])
    for one, other in zip(belief_from(algorithm, seen), shuffled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_belief_sharpens_with_every_transition():
    algorithm = build(make_spec()).algorithm
    seen = context()
    spread = [belief_from(algorithm, [x[:n] for x in seen])[1] for n in range(21)]
    assert not spread[0].any()  # the prior
    assert all((later < sooner).all() for sooner, later in pairwise(spread))


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


def test_a_belief_renewed_within_episodes_moves_the_latent_there():
    _, _, _, latents = playing(make_spec(belief_steps=2), [1])
    spans = latents.reshape(3, 2, 4, LATENT)
    assert torch.equal(spans[:, 0], spans[:, 1])
    assert len({tuple(x.flatten().tolist()) for x in spans[:, 0]}) == 3


def test_kept_noise_is_as_strong_as_that_drawn_anew_and_stays_for_an_episode():
    columns, steps = 4096, 5
    spec = make_spec(kept_noise=0.6, tasks={"type": "point_goal", "horizon": steps, "episodes": 2})
    program = build(spec)
    sampler = Sampler(program.distribution, columns, memory_spans_trial=False)
    sampler.start(np.random.default_rng(0), 0)
    tasks = program.distribution.sample(np.random.default_rng(0), 4, "train")
    noise, act, plain = [], program.algorithm._act, []

    def watching(latent, kept, drift, obs, *inputs):
        mean, log_std = program.policy(obs, latent=latent)[0].chunk(2, -1)
        plain.append((mean, log_std))
        return act(latent, kept, drift, obs, *inputs)

    program.algorithm._act = watching
    trial = program.algorithm.collect(sampler, tasks)
    actions = torch.cat([torch.from_numpy(rollout.action) for rollout in trial])
    for action, (mean, log_std) in zip(actions, plain, strict=True):
        unsquashed = action.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        noise.append(((unsquashed - mean[0]) / log_std[0].exp()).clamp(-4, 4))
    noise = torch.stack(noise).reshape(2, steps, -1)  # episode, step, column and action
    correlation = torch.corrcoef(noise.reshape(2 * steps, -1))
    same_episode = torch.block_diag(*[torch.ones(steps, steps)] * 2).bool()
    expected = torch.where(same_episode, torch.tensor(0.36), torch.tensor(0.0))
    expected.fill_diagonal_(1.0)
    torch.testing.assert_close(correlation, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(noise.std((0, 2)), torch.ones(steps), rtol=0, atol=0.05)


def test_discrete_actions_have_no_noise_to_keep():
    with pytest.raises(ValueError, match="kept_noise: discrete actions"):
        build(make_spec(tasks={"type": "grid_nav"}, kept_noise=0.5))


def test_a_trial_played_in_parts_is_remembered_whole():
    whole, parts = (playing(make_spec(), n) for n in ([3], [2, 1]))
    for one, other in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole[3], parts[3])


@pytest.mark.parametrize("belief_steps", [None, 4])
def test_the_learner_believes_what_the_worker_did(belief_steps):
    algorithm, memory, trial, _ = playing(make_spec(belief_steps=belief_steps), [EPISODES])
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
    algorithm._improve()
    of_critics, of_policy = calls
    assert all(gradient.abs().sum() > 0 for gradient in of_critics)
    assert all(gradient is None for gradient in of_policy)


def test_a_transition_is_told_what_a_beginning_of_its_own_trial_shows():
    algorithm = trained(make_spec())[0].algorithm
    slots, steps = np.array([2, 0]), algorithm.config.batch_steps
    algorithm.rng = np.random.default_rng(0)
    told, _ = algorithm.infer(slots, slice(None))
    rng = np.random.default_rng(0)
    known = rng.integers(2 * HORIZON + 1, size=(2, steps))
    noise = torch.from_numpy(rng.standard_normal((2, steps, LATENT), dtype=np.float32))
    seen = algorithm.replay.take(slots)
    for i, k in np.ndindex(2, steps):
        beginning = (x[i, : known[i, k], None] for x in (seen.obs, seen.action, seen.reward))
        latent = gaussian_sample(*belief_from(algorithm, beginning), noise[i, k])
        torch.testing.assert_close(told[i, k], latent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "counts"), [(0, True), (2 * HORIZON, False)])
def test_only_the_context_episodes_are_context(first, counts):
    algorithm = trained(make_spec())[0].algorithm
    latents = []
    for _ in range(2):
        algorithm.rng = np.random.default_rng(0)
        latents.append(algorithm.infer(np.arange(4), slice(None))[0])
        algorithm.replay._arrays["reward"][:, first:] += 1.0
    assert torch.equal(*latents) != counts


@pytest.mark.parametrize("tasks", [POINTS, GRID], ids=["continuous", "discrete"])
def test_a_learner_from_a_checkpoint_goes_on_bit_for_bit(tasks):
    assert_resumes(make_spec(tasks))


@pytest.mark.parametrize("tasks", [POINTS, GRID], ids=["continuous", "discrete"])
def test_the_shares_of_several_learners_average_to_the_whole_gradient(tasks):
    assert_shares_average_to_the_whole(trained(make_spec(tasks))[0].algorithm)


@pytest.mark.parametrize("tasks", [POINTS, "cartpole"], ids=["equal", "unequal"])
def test_shots_are_the_episodes_of_a_trial(tasks):
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
