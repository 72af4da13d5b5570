"""Returns, advantages, losses and distributions against hand numbers, limits and torch's own."""

import math

import pytest
import torch

from dmrl_ray.losses.averages import standardized
from dmrl_ray.losses.distributions import (
    categorical_entropy,
    categorical_log_prob,
    gaussian_entropy,
    gaussian_log_prob,
)
from dmrl_ray.losses.policy_gradient import (
    likelihood_ratio_loss,
    policy_gradient_loss,
    ppo_clip_loss,
    value_loss,
)
from dmrl_ray.losses.returns import (
    generalized_advantage,
    linear_baseline,
    reverse_scan,
    trial_advantage,
    vtrace,
)


def f(values):
    """One column (T, 1)."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def b(values):
    return torch.tensor(values, dtype=torch.bool).unsqueeze(-1)


def random_case(steps=12, columns=5, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(steps, columns, generator=g, dtype=torch.float64)

    ends = [torch.rand(steps, columns, generator=g) < 0.2 for _ in range(2)]
    return normal(), normal(), normal(), *ends


def test_a_scan_by_hand():
    # y[2] = 3; y[1] = 2 + 0.5 * 3 = 3.5; y[0] = 1 + 0 * 3.5 = 1; the last decay has no successor.
    y = reverse_scan(f([1, 2, 3]), f([0, 0.5, 99]))
    torch.testing.assert_close(y, f([1, 3.5, 3]))


def test_gae_by_hand():
    # gamma = 0.5, lambda = 0.5; two steps, the second is terminal.
    #   delta[1] = 4 + 0      - 2 = 2            A[1] = 2
    #   delta[0] = 1 + 0.5*2  - 1 = 1            A[0] = 1 + 0.25 * 2 = 1.5
    advantage = generalized_advantage(
        f([1, 4]), f([1, 2]), f([2, 99]), b([0, 1]), b([0, 0]), gamma=0.5, gae_lambda=0.5
    )
    torch.testing.assert_close(advantage, f([1.5, 2.0]))


def test_truncation_bootstraps_but_cuts_the_trace():
    # delta[1] = 4 + 0.5*0 - 2 = 2; delta[0] = 1 + 0.5*6 - 1 = 3, and nothing of A[1].
    advantage = generalized_advantage(
        f([1, 4]), f([1, 2]), f([6, 0]), b([0, 0]), b([1, 0]), gamma=0.5, gae_lambda=0.5
    )
    torch.testing.assert_close(advantage, f([3, 2]))


def test_terminated_and_truncated_is_terminated():
    reward, value, following, ends, _ = random_case()
    never = torch.zeros_like(ends)
    one, other = (
        generalized_advantage(reward, value, following, ends, also, gamma=0.9, gae_lambda=0.9)
        for also in (ends, never)
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_perfect_values_have_no_advantage(gae_lambda):
    # A constant reward of 1 forever is worth 1 / (1 - gamma) everywhere.
    gamma = 0.9
    value = torch.full((7, 3), 1 / (1 - gamma), dtype=torch.float64)
    never = torch.zeros_like(value, dtype=torch.bool)
    advantage = generalized_advantage(
        torch.ones_like(value), value, value, never, never, gamma=gamma, gae_lambda=gae_lambda
    )
    torch.testing.assert_close(advantage, torch.zeros_like(value))


def test_lambda_one_gives_returns_minus_values():
    reward, value, following, terminated, truncated = random_case()
    # Inside an episode the successor's value is the next row's; the sum telescopes.
    ends = truncated | terminated
    following[:-1] = torch.where(ends[:-1], following[:-1], value[1:])
    advantage = generalized_advantage(
        reward, value, following, terminated, truncated, gamma=0.9, gae_lambda=1.0
    )
    for column in range(reward.shape[1]):
        for start in range(reward.shape[0]):
            total, weight = 0.0, 1.0
            for t in range(start, reward.shape[0]):
                total += weight * reward[t, column].item()
                weight *= 0.9
                if terminated[t, column]:
                    break
                if truncated[t, column] or t == reward.shape[0] - 1:
                    total += weight * following[t, column].item()
                    break
            expected = total - value[start, column].item()
            assert advantage[start, column].item() == pytest.approx(expected)


def test_lambda_zero_gives_one_step_errors():
    reward, value, following, terminated, truncated = random_case()
    advantage = generalized_advantage(
        reward, value, following, terminated, truncated, gamma=0.9, gae_lambda=0.0
    )
    successor = torch.where(terminated, 0.0, following)
    torch.testing.assert_close(advantage, reward + 0.9 * successor - value)


def test_advantages_carry_no_gradient():
    reward, value, following, *ends = random_case()
    value.requires_grad_()
    advantage = generalized_advantage(reward, value, following, *ends, gamma=0.9, gae_lambda=0.9)
    assert not advantage.requires_grad


PAPER = dict(gamma=0.9, gae_lambda=1.0, rho_bar=1.0, c_bar=1.0)


def test_vtrace_by_hand():
    # gamma = 0.5, rho_bar = 2, c_bar = 1; two steps, the second is terminal.
    #   rho = min(2, [0.5, 4]) = [0.5, 2]; c[0] = 0.5
    #   delta = [1 + 0.5*2 - 1, 4 - 2] = [1, 2]
    #   above[1] = 2*2 = 4; above[0] = 0.5*1 + 0.5*0.5*4 = 1.5; target = [1 + 1.5, 2 + 4]
    #   A[1] = 2*2 = 4; A[0] = 0.5 * (1 + 0.5*target[1] - 1) = 0.5 * (1 + 3 - 1) = 1.5
    rest = (f([1, 4]), f([1, 2]), f([2, 99]), b([0, 1]), b([0, 0]))
    settings = dict(gamma=0.5, gae_lambda=1.0, rho_bar=2.0, c_bar=1.0)
    target, advantage = vtrace(f([0.5, 4]), *rest, **settings)
    torch.testing.assert_close(target, f([2.5, 6]))
    torch.testing.assert_close(advantage, f([1.5, 4]))
    # lambda = 0.5: above[0] = 0.5*1 + 0.5*0.25*4 = 1; A[0] = 0.5 * (1 + 0.5*0.5*4) = 1
    target, advantage = vtrace(f([0.5, 4]), *rest, **settings | {"gae_lambda": 0.5})
    torch.testing.assert_close(target, f([2, 6]))
    torch.testing.assert_close(advantage, f([1, 4]))


def test_a_trace_is_cut_where_time_ran_out():
    # gamma = 0.5: A[0] = 1 + 0.5*6 - 1 = 3 and nothing of above[1] = 4 + 0 - 2.
    rest = (f([1, 4]), f([1, 2]), f([6, 0]), b([0, 0]), b([1, 0]))
    target, advantage = vtrace(f([1, 1]), *rest, **PAPER | {"gamma": 0.5})
    torch.testing.assert_close(target, f([4, 4]))
    torch.testing.assert_close(advantage, f([3, 2]))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_vtrace_on_policy_is_generalized_advantage(gae_lambda):
    case = random_case()
    settings = dict(gamma=0.9, gae_lambda=gae_lambda)
    target, advantage = vtrace(torch.ones_like(case[0]), *case, **settings, rho_bar=1.0, c_bar=1.0)
    expected = generalized_advantage(*case, **settings)
    torch.testing.assert_close(advantage, expected)
    torch.testing.assert_close(target, case[1] + expected)


def random_ratio(like, seed=1):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like).exp()


def test_vtrace_agrees_with_the_sum_of_the_paper():
    # Eq. 1, written as it stands: discounts and traces multiplied up, and cut at an end.
    reward, value, following, terminated, truncated = case = random_case()
    ratio = random_ratio(reward)
    target, _ = vtrace(ratio, *case, gamma=0.9, gae_lambda=1.0, rho_bar=1.5, c_bar=0.8)
    delta = ratio.clamp_max(1.5) * (reward + 0.9 * following * ~terminated - value)
    done = terminated | truncated
    for column in range(reward.shape[1]):
        for s in range(reward.shape[0]):
            expected, weight = value[s, column].item(), 1.0
            for t in range(s, reward.shape[0]):
                expected += weight * delta[t, column].item()
                if done[t, column]:
                    break
                weight *= 0.9 * min(0.8, ratio[t, column].item())
            assert target[s, column].item() == pytest.approx(expected)


def test_without_weight_nothing_is_learned_from_what_another_policy_did():
    case = random_case()
    target, advantage = vtrace(random_ratio(case[0]), *case, **PAPER | {"rho_bar": 0.0})
    torch.testing.assert_close(target, case[1])
    torch.testing.assert_close(advantage, torch.zeros_like(target))


def test_without_traces_a_target_looks_one_step_ahead():
    reward, value, following, terminated, _ = case = random_case()
    ratio = random_ratio(reward)
    target, _ = vtrace(ratio, *case, **PAPER | {"c_bar": 0.0})
    error = reward + 0.9 * torch.where(terminated, 0.0, following) - value
    torch.testing.assert_close(target, value + ratio.clamp_max(1.0) * error)


def test_unbounded_vtrace_estimates_the_return_of_the_other_policy():
    # One state, two actions that pay 0 and 1, two steps. The actor takes each half of the time,
    # the learner the second one with probability 0.9: worth 0.9 + 0.9 a episode. The mean over
    # the four episodes, all as likely, is that to the last digit.
    action = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    ratio = torch.tensor([0.1, 0.9], dtype=torch.float64)[action] / 0.5
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    ends = torch.tensor([[False] * 4, [True] * 4])
    target, _ = vtrace(
        ratio,
        action.double(),
        nothing,
        nothing,
        ends,
        torch.zeros_like(ends),
        gamma=1.0,
        gae_lambda=1.0,
        rho_bar=math.inf,
        c_bar=math.inf,
    )
    assert target[0].mean().item() == pytest.approx(1.8)


def test_vtrace_carries_no_gradient():
    case = random_case()
    ratio = random_ratio(case[0]).requires_grad_()
    assert not any(x.requires_grad for x in vtrace(ratio, *case, **PAPER))


def test_a_trials_advantage_runs_across_episode_ends_and_stops_at_its_own():
    # gamma = 0.5, lambda = 1: the return of the whole trial, nothing after it, minus values.
    #   G[2] = 4, G[1] = 2 + 2 = 4, G[0] = 1 + 2 = 3
    advantage = trial_advantage(f([1, 2, 4]), f([1, 1, 1]), gamma=0.5, gae_lambda=1.0)
    torch.testing.assert_close(advantage, f([2, 3, 3]))


def test_a_trials_advantage_is_that_of_one_long_episode():
    reward, value, _, _, _ = random_case()
    end = torch.zeros_like(reward, dtype=torch.bool)
    end[-1] = True
    following = torch.cat([value[1:], torch.full_like(value[:1], 99)])
    settings = dict(gamma=0.9, gae_lambda=0.3)
    torch.testing.assert_close(
        trial_advantage(reward, value, **settings),
        generalized_advantage(reward, value, following, end, torch.zeros_like(end), **settings),
    )


@pytest.mark.parametrize(("ratio", "advantage"), [(1.65, 1.0), (0.5, -1.0)])
def test_the_ppo_gradient_vanishes_outside_the_trust_interval(ratio, advantage):
    log_prob = f([math.log(ratio)]).requires_grad_()
    ppo_clip_loss(log_prob, f([0]), f([advantage]), clip=0.2).backward()
    assert log_prob.grad == 0


@pytest.mark.parametrize(("ratio", "advantage"), [(1.65, -1.0), (0.5, 1.0)])
def test_a_ratio_on_the_wrong_side_is_still_pulled_back(ratio, advantage):
    log_prob = f([math.log(ratio)]).requires_grad_()
    ppo_clip_loss(log_prob, f([0]), f([advantage]), clip=0.2).backward()
    torch.testing.assert_close(log_prob.grad, f([-ratio * advantage]))


def test_the_ppo_loss_by_hand():
    # ratio 2, advantage 1: clipped to 1.2; ratio 0.5, advantage -3: clipped to 0.8, -2.4.
    loss = ppo_clip_loss(f([math.log(2), math.log(0.5)]), f([0, 0]), f([1, -3]), clip=0.2)
    torch.testing.assert_close(loss, -torch.tensor((1.2 - 2.4) / 2, dtype=torch.float64))


def test_the_value_loss_by_hand():
    # errors 1 and 3 count: (1 + 9) / 2 / 2; a gradient is the error over their number
    value = f([2, 4, 100]).requires_grad_()
    loss = value_loss(value, f([1, 1, 0]), mask=b([1, 1, 0]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(2.5, dtype=torch.float64))
    torch.testing.assert_close(value.grad, f([0.5, 1.5, 0]))


def test_the_policy_gradient_weighs_log_probabilities_by_advantages():
    # of the two that count: -(2, -1) / 2
    log_prob = f([-1, -2, -3]).requires_grad_()
    policy_gradient_loss(log_prob, f([2, -1, 7]), mask=b([1, 1, 0])).backward()
    torch.testing.assert_close(log_prob.grad, f([-1, 0.5, 0]))


def test_without_a_clip_ppo_is_the_likelihood_ratio():
    behaviour, now, advantage, _, _ = random_case()
    gradients = []
    for loss in (ppo_clip_loss, likelihood_ratio_loss):
        log_prob = now.clone().requires_grad_()
        clip = {"clip": math.inf} if loss is ppo_clip_loss else {}
        loss(log_prob, behaviour, advantage, **clip).backward()
        gradients.append(log_prob.grad)
    torch.testing.assert_close(*gradients)


def test_the_likelihood_ratios_gradient_where_it_acted_is_the_policy_gradient():
    behaviour, _, advantage, _, _ = random_case()
    log_prob = behaviour.clone().requires_grad_()
    likelihood_ratio_loss(log_prob, behaviour, advantage).backward()
    torch.testing.assert_close(log_prob.grad, -advantage / advantage.numel())


def test_categorical_distributions_are_torchs():
    logits = torch.randn(6, 4, 5, dtype=torch.float64) * 3
    action = torch.randint(5, (6, 4))
    reference = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(categorical_log_prob(logits, action), reference.log_prob(action))
    torch.testing.assert_close(categorical_entropy(logits), reference.entropy())


def test_gaussian_distributions_are_torchs():
    mean, log_std, action = torch.randn(3, 6, 4, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, log_std.exp())
    reference = torch.distributions.Independent(normal, 1)
    torch.testing.assert_close(gaussian_log_prob(mean, log_std, action), reference.log_prob(action))
    torch.testing.assert_close(gaussian_entropy(log_std), reference.entropy())


def episodes_of(lengths):
    """Ends (T,) of episodes of these lengths, one after the other."""
    done = torch.zeros(sum(lengths), dtype=torch.bool)
    done[torch.tensor(lengths).cumsum(0) - 1] = True
    return done


def linear_case(weights):
    """Rewards (T, N, E) whose returns are linear in (obs, obs^2, clock, 1), by task."""
    tasks, columns, gamma = len(weights), 6, 0.9
    done = episodes_of([5, 7, 8])[:, None, None].expand(20, tasks, columns)
    g = torch.Generator().manual_seed(0)
    obs = torch.randn(20, tasks, columns, 2, generator=g, dtype=torch.float64)
    clock = torch.cat([torch.arange(n) for n in (5, 7, 8)])[:, None, None] / 100
    w = torch.tensor(weights, dtype=torch.float64)[None, :, None]
    returns = (
        w[..., 0] * obs[..., 0] + w[..., 1] * obs[..., 1] ** 2 + w[..., 2] * clock**2 + w[..., 3]
    )
    following = torch.cat([returns[1:], torch.zeros_like(returns[:1])]) * ~done
    return obs, returns - gamma * following, done, returns, gamma


def test_the_baseline_predicts_exactly_what_is_linear_in_its_features_per_task():
    obs, reward, done, returns, gamma = linear_case([[1, 2, 50, 3], [-4, 0.5, -80, 0]])
    value = linear_baseline(obs, reward, done, gamma=gamma, ridge=1e-12)
    torch.testing.assert_close(value, returns, rtol=1e-4, atol=1e-4)


def test_the_baseline_of_a_task_does_not_see_another_task():
    obs, reward, done, _, gamma = linear_case([[1, 2, 50, 3], [-4, 0.5, -80, 0]])
    before = linear_baseline(obs, reward, done, gamma=gamma)
    reward[:, 1] = torch.randn(20, 6, dtype=torch.float64)
    after = linear_baseline(obs, reward, done, gamma=gamma)
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_the_baselines_returns_end_with_the_episode():
    # One reward of 1 in the second episode; the first has no return at all, so with observations
    # that tell the episodes apart the fit is zero there.
    done = episodes_of([3, 3])[:, None, None]
    reward = torch.zeros(6, 1, 1, dtype=torch.float64)
    reward[5] = 1
    obs = (torch.arange(6) >= 3).double()[:, None, None, None]
    value = linear_baseline(obs, reward, done, gamma=1.0, ridge=1e-9)
    torch.testing.assert_close(value[:, 0], f([0, 0, 0, 1, 1, 1]), atol=1e-4, rtol=0)


ADVANTAGE = dict(reward=0, value=0, next_value=0, terminated=0, truncated=0)


@pytest.mark.parametrize("name", list(ADVANTAGE)[1:])
def test_gae_names_the_argument_of_the_wrong_shape(name):
    shapes = {other: (4, 3) for other in ADVANTAGE} | {name: (4, 3, 1)}
    tensors = [
        torch.zeros(shape, dtype=torch.bool if n[0] == "t" else torch.float32)
        for n, shape in shapes.items()
    ]
    with pytest.raises(
        ValueError, match=rf"^{name} has shape \(4, 3, 1\), but reward has \(4, 3\)"
    ):
        generalized_advantage(*tensors, gamma=0.9, gae_lambda=0.9)


@pytest.mark.parametrize("loss", [ppo_clip_loss, likelihood_ratio_loss])
@pytest.mark.parametrize("name", ["behaviour_log_prob", "advantage"])
def test_a_loss_names_the_argument_of_the_wrong_shape(loss, name):
    # (4, 1) against (4, 3) would broadcast, and train on nonsense.
    tensors = {n: torch.zeros(4, 3) for n in ("log_prob", "behaviour_log_prob", "advantage")}
    tensors[name] = torch.zeros(4, 1)
    clip = {"clip": 0.2} if loss is ppo_clip_loss else {}
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        loss(**tensors, **clip)


@pytest.mark.parametrize("name", ["obs", "done"])
def test_the_baseline_names_the_argument_of_the_wrong_shape(name):
    tensors = {
        "obs": torch.zeros(4, 2, 3, 5),
        "reward": torch.zeros(4, 2, 3),
        "done": torch.zeros(4, 2, 3, dtype=torch.bool),
    }
    tensors[name] = tensors[name][:, :1]
    with pytest.raises(ValueError, match=f"^{name}.* has shape"):
        linear_baseline(**tensors, gamma=0.9)


def test_a_scale_by_hand():
    # The mean of 1, 2, 6 is 3 and their deviation sqrt((4 + 1 + 9) / 2) = sqrt(7).
    expected = torch.tensor([-2.0, -1.0, 3.0]) / 7**0.5
    torch.testing.assert_close(standardized(torch.tensor([1.0, 2.0, 6.0])), expected)
    x, mask = torch.tensor([1.0, 50.0, 2.0, 6.0]), torch.tensor([True, False, True, True])
    counted = torch.stack([expected[0], torch.tensor(0.0), *expected[1:]])
    torch.testing.assert_close(standardized(x, mask), counted)
    torch.testing.assert_close(standardized(x[:, None], mask[:, None], dim=(0,))[:, 0], counted)


@pytest.mark.parametrize("dim", [None, (0, 2)])
def test_a_single_number_has_the_scale_zero(dim):
    x, mask = torch.tensor([[[5.0], [7.0]]]), torch.tensor([[[True], [False]]])
    one = x[:, :1]
    assert torch.equal(standardized(one, dim=dim), torch.zeros_like(one))
    assert torch.equal(standardized(x, mask, dim), torch.zeros_like(x))
