"""A posterior that is updated within episodes, and exploration noise that is kept for one."""

import numpy as np
import pytest
import torch
from test_pearl import LATENT, make_spec, playing

from dmrl_ray.jobs.spec import build
from dmrl_ray.rollout.sampler import Sampler


def test_a_posterior_updated_within_episodes_moves_the_latent_there():
    _, _, _, latents = playing(make_spec(kind="stepwise_pearl", belief_steps=2), [1])
    spans = latents.reshape(3, 2, 4, LATENT)
    assert torch.equal(spans[:, 0], spans[:, 1])
    assert len({tuple(x.flatten().tolist()) for x in spans[:, 0]}) == 3


def test_kept_noise_has_the_standard_deviation_of_independent_noise_and_lasts_an_episode():
    num_envs, steps = 4096, 5
    family = {"type": "point_goal", "horizon": steps, "episodes": 2}
    program = build(make_spec(family, "stepwise_pearl", kept_noise=0.6))
    sampler = Sampler(program.distribution, num_envs, memory_spans_trial=False)
    sampler.start(np.random.default_rng(0), 0)
    tasks = program.distribution.sample(np.random.default_rng(0), 4, "train")
    noise, plain = [], []
    program.policy.register_forward_hook(lambda _, args, out: plain.append(out[0].chunk(2, -1)))
    trial = program.algorithm.collect(sampler, tasks)
    actions = torch.cat([torch.from_numpy(rollout.action) for rollout in trial])
    for action, (mean, log_std) in zip(actions, plain, strict=True):
        unsquashed = action.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        noise.append(((unsquashed - mean[0]) / log_std[0].exp()).clamp(-4, 4))
    noise = torch.stack(noise).reshape(2, steps, -1)  # episode, step, environment and action
    correlation = torch.corrcoef(noise.reshape(2 * steps, -1))
    same_episode = torch.block_diag(*[torch.ones(steps, steps)] * 2).bool()
    expected = torch.where(same_episode, torch.tensor(0.36), torch.tensor(0.0))
    expected.fill_diagonal_(1.0)
    torch.testing.assert_close(correlation, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(noise.std((0, 2)), torch.ones(steps), rtol=0, atol=0.05)


def test_discrete_actions_have_no_noise_to_keep():
    with pytest.raises(ValueError, match="kept_noise: discrete actions"):
        build(make_spec({"type": "grid_nav"}, "stepwise_pearl", kept_noise=0.5))
