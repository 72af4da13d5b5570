"""Action heads, running norms, and the actor-critic that joins them."""

import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from dmrl_ray.networks.actor_critic import ActorCritic, RunningNorm, mask_previous
from dmrl_ray.networks.heads import CategoricalHead, GaussianHead
from dmrl_ray.tasks.spaces import Packed

VECTOR, IMAGE = Box(-1, 1, (3,), np.float32), Box(0, 255, (6, 5, 3), np.uint8)
LSTM = {"type": "lstm", "hidden_size": 8}


def make_policy(obs=VECTOR, action=None, *, sees_previous=False, **settings):
    torch.manual_seed(0)
    config = ActorCritic.Config.model_validate(settings)
    return ActorCritic(config, obs, action or Discrete(4), sees_previous=sees_previous)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_sampled_actions_are_as_frequent_as_softmax_says():
    head, steps, columns = CategoricalHead(nn.Linear(2, 4), 4), 500, 400
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    action = head.sample(logits.expand(steps, columns, 4), head.noise(rng(), steps, columns))
    frequency = torch.bincount(action.flatten(), minlength=4) / action.numel()
    # 200 000 samples: the standard error is at most 0.0011.
    torch.testing.assert_close(frequency, logits.softmax(0), atol=0.005, rtol=0)


def test_neighbouring_samples_are_independent():
    head = CategoricalHead(nn.Linear(2, 2), 2)
    action = head.sample(torch.zeros(300, 300, 2), head.noise(rng(), 300, 300)).double()
    for a, b in ((action[1:], action[:-1]), (action[:, 1:], action[:, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.02  # six standard errors


def test_gaussian_samples_have_their_mean_and_deviation():
    head, steps, columns = GaussianHead(nn.Linear(2, 2), 2), 500, 400
    pi = torch.tensor([1.0, -2.0, math.log(0.5), math.log(2.0)]).expand(steps, columns, 4)
    action = head.sample(pi, head.noise(rng(), steps, columns)).flatten(0, 1)
    torch.testing.assert_close(action.mean(0), torch.tensor([1.0, -2.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(action.std(0), torch.tensor([0.5, 2.0]), atol=0.02, rtol=0)


def test_the_first_policy_is_almost_uniform():
    policy = make_policy()
    pi = policy(torch.randn(1, 100, 3))[0]
    assert (pi.softmax(-1) - 0.25).abs().max() < 0.02


def test_codes_of_actions_are_one_hot_and_no_action_is_zeros():
    code = CategoricalHead(nn.Linear(2, 3), 3).encode(torch.tensor([[-1, 0, 2]]))
    assert code.tolist() == [[[0, 0, 0], [1, 0, 0], [0, 0, 1]]]


def test_codes_of_continuous_actions_are_what_the_environment_felt():
    code = GaussianHead(nn.Linear(2, 2), 2).encode(torch.tensor([[1.5, -0.3]]))
    torch.testing.assert_close(code, torch.tensor([[1.0, -0.3]]))


def test_nothing_came_before_a_reset():
    reset = torch.tensor([[True, False]])
    action, reward, done = mask_previous(
        torch.tensor([[2, 3]]), torch.tensor([[5.0, 6.0]]), torch.tensor([[False, False]]), reset
    )
    assert action.tolist() == [[-1, 3]]
    assert reward.tolist() == [[0, 6]]
    assert done.tolist() == [[True, False]]


def test_a_norm_is_the_plain_mean_and_deviation_of_the_first_batches():
    g = torch.Generator().manual_seed(0)
    norm = RunningNorm((2,))
    batches = [torch.randn(40, 2, generator=g) * (i + 1) + 3 * i for i in range(20)]
    for batch in batches:
        norm.update(batch)
    everything = torch.cat(batches)
    torch.testing.assert_close(norm.mean, everything.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.std, everything.std(0, correction=0), rtol=1e-4, atol=1e-5)


def test_a_norm_sees_small_deviations_far_from_zero():
    g = torch.Generator().manual_seed(0)
    norm = RunningNorm(())
    batches = [torch.randn(1000, generator=g) * 0.3 - 1000 for _ in range(5)]
    for batch in batches:
        norm.update(batch)
    assert norm.std.item() == pytest.approx(0.3, rel=0.02)


def test_a_norm_follows_what_moves():
    # After 100 batches at 0 every batch weighs 1/100: 300 more at 1 leave (1 - 1/100)^300 = 0.05.
    norm = RunningNorm(())
    for value in [0.0] * 100 + [1.0] * 300:
        norm.update(torch.full((10,), value))
    assert norm.mean.item() == pytest.approx(1 - 0.99**300, abs=0.001)


@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678])
def test_a_constant_input_becomes_zero(value):
    norm = RunningNorm((2,))
    for _ in range(7):
        norm.update(torch.full((10, 2), value))
    assert (norm.normalize(torch.full((3, 2), value)) == 0).all()


@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_do_not_enter_a_norm(shape, bad):
    norm, expected = RunningNorm(shape), RunningNorm(shape)
    batch = torch.randn(20, *shape) * 3 + 5
    broken = torch.cat([batch, batch[:1]])
    broken[-1:].flatten()[:1] = bad
    norm.update(torch.full_like(batch, bad))
    norm.update(broken)
    expected.update(batch)
    for found, wanted in zip(norm.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_largest_numbers_leave_a_norm_finite():
    norm = RunningNorm(())
    for _ in range(3):
        norm.update(torch.tensor([-3e38, 3e38]))
    assert torch.isfinite(norm.std)
    assert torch.isfinite(norm.normalize(torch.tensor([0.0, 3e38]))).all()


def test_a_norm_that_saw_nothing_changes_nothing():
    x = torch.randn(5, 2)
    torch.testing.assert_close(RunningNorm((2,)).normalize(x), x)


def test_normalised_values_make_the_round_trip():
    policy = make_policy()
    policy.value_norm.update(torch.randn(100) * 30 - 200)
    value = torch.linspace(-400, 0, 20)
    back = policy.denormalize_value(policy.normalize_value(value))
    torch.testing.assert_close(back, value, rtol=1e-4, atol=1e-2)


def test_far_observations_are_clipped():
    policy = make_policy()
    obs = torch.tensor([-1e9, 0.5, 1e9])
    assert policy.scale(obs).tolist() == [-10, 0.5, 10]


def test_a_rare_value_target_is_not_clipped():
    # One of 2,000 steps is worth 1: mean 0.0005, deviation sqrt(0.0005 * 0.9995) = 0.02235, so
    # that it lies 44.7 deviations away. Clipped at 10 it would be 0.224.
    policy = make_policy()
    target = torch.zeros(2000)
    target[7] = 1
    policy.value_norm.update(target)
    scaled = policy.normalize_value(target)
    assert scaled[7].item() == pytest.approx(44.7, abs=0.05)
    assert policy.denormalize_value(scaled)[7].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("encoder", "chosen", "separate"),
    [
        ("mlp", None, True),
        (LSTM, None, False),
        ("mlp", False, False),
        (LSTM, True, True),
    ],
)
def test_the_value_function_is_apart_by_default_unless_there_is_memory(encoder, chosen, separate):
    policy = make_policy(encoder=encoder, separate_value=chosen)
    assert (policy.value_encoder is not None) == separate


def test_a_value_function_apart_does_not_touch_the_actors_encoder():
    policy = make_policy()
    policy.value(None, torch.randn(1, 5, 3)).sum().backward()
    assert all(p.grad is None for p in policy.encoder.parameters())
    assert all(p.grad is not None for p in policy.value_encoder.parameters())


def test_the_actor_does_not_train_the_value_function():
    policy = make_policy()
    policy(torch.randn(1, 5, 3))[0].sum().backward()
    for part in (policy.value_encoder, policy.value_head):
        assert all(p.grad is None for p in part.parameters())


def test_images_are_scaled_to_one_and_not_normalised():
    policy = make_policy(IMAGE, encoder="cnn")
    images = torch.randint(256, (2, 3, 6, 5, 3), dtype=torch.uint8)
    assert policy.obs_norm is None
    expected = policy.policy_head(policy.encoder(images.float() / 255, None, (), None)[0])
    torch.testing.assert_close(policy(images)[0], expected)


def test_observations_are_normalised_before_the_encoder():
    policy = make_policy()
    obs = torch.randn(1, 50, 3) * 4 + 7
    policy.obs_norm.update(obs[0])
    scaled = (obs - obs[0].mean(0)) / obs[0].std(0, correction=0)
    expected = policy.policy_head(policy.encoder(scaled, None, (), None)[0])
    torch.testing.assert_close(policy(obs)[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("action", [Discrete(4), Box(-1, 1, (2,), np.float32)])
@pytest.mark.parametrize("part", range(3), ids=["action", "reward", "done"])
def test_the_policy_sees_every_part_of_the_previous_step(action, part):
    policy = make_policy(action=action, sees_previous=True)
    discrete = isinstance(action, Discrete)
    previous = [
        torch.ones(1, 2, dtype=torch.int64) if discrete else torch.full((1, 2, 2), 0.5),
        torch.zeros(1, 2),
        torch.zeros(1, 2, dtype=torch.bool),
    ]
    before = policy(torch.zeros(1, 2, 3), tuple(previous))[1]
    previous[part] = ~previous[part] if part == 2 else previous[part] - 0.25 * (1 + 3 * discrete)
    previous[0] = previous[0].to(torch.int64) if discrete else previous[0]
    after = policy(torch.zeros(1, 2, 3), tuple(previous))[1]
    assert not torch.equal(before, after)


def test_norms_travel_with_the_weights_and_are_not_trained():
    policy = make_policy()
    names = policy.state_dict().keys() - dict(policy.named_parameters()).keys()
    assert {name.split(".")[0] for name in names} == {"obs_norm", "value_norm"}


def test_the_deviation_of_actions_stays_in_its_bounds():
    head = GaussianHead(nn.Linear(2, 2), 2)
    with torch.no_grad():
        head.log_std.copy_(torch.tensor([-9.0, 9.0]))
    assert head(torch.zeros(1, 1, 2))[0, 0, 2:].tolist() == [-3, 1]


def test_a_latent_that_is_not_given_is_zero():
    torch.manual_seed(0)
    spaces = VECTOR, Box(-1, 1, (2,), np.float32)
    policy = ActorCritic(ActorCritic.Config(), *spaces, sees_previous=False, latent=4)
    obs = torch.randn(5, 6, 3)
    torch.testing.assert_close(policy(obs)[0], policy(obs, latent=torch.zeros(5, 6, 4))[0])
    assert not torch.equal(policy(obs)[0], policy(obs, latent=torch.ones(5, 6, 4))[0])


@pytest.mark.parametrize(("asked", "needed"), [(True, False), (False, True)])
def test_squashed_actions_have_a_spread_of_their_own_for_each_observation(asked, needed):
    torch.manual_seed(0)
    spaces = VECTOR, Box(-1, 1, (2,), np.float32)
    config = ActorCritic.Config(squashed=asked)
    policy = ActorCritic(config, *spaces, sees_previous=False, squashed=needed)
    log_std = policy(torch.randn(1, 6, 3))[0].chunk(2, -1)[1]
    assert log_std.std(1).min() > 0


@pytest.mark.parametrize("critic_only", [(), ("task",)])
def test_a_new_scale_of_returns_leaves_the_values_as_they_are(critic_only):
    space = Packed({"obs": VECTOR, "task": VECTOR})
    config = ActorCritic.Config(critic_only=critic_only, separate_value=False)
    net = ActorCritic(config, space, Discrete(2), sees_previous=False)
    net.update_value_norm(torch.randn(100) * 3 - 40)
    obs = torch.randn(1, 5, 6)

    def values():
        return net.denormalize_value(net.value(net(obs)[1], obs))

    before, scale = values(), net.value_norm.std.clone()
    net.update_value_norm(torch.randn(100) * 30 + 10)
    assert not torch.allclose(net.value_norm.std, scale)
    torch.testing.assert_close(values(), before, rtol=1e-4, atol=1e-4)


def test_the_first_scale_of_returns_is_taken_on():
    net = make_policy()
    obs = torch.randn(1, 5, 3)
    before = net.value(None, obs)
    net.update_value_norm(torch.randn(100) * 3 - 40)
    torch.testing.assert_close(net.value(None, obs), before)
    assert net.denormalize_value(net.value(None, obs)).mean() < -30


def test_a_frozen_critic_keeps_its_scale():
    net = make_policy()
    net.value_head.requires_grad_(False)
    net.update_value_norm(torch.randn(100) * 3 - 40)
    assert net.value_norm.mean == 0
