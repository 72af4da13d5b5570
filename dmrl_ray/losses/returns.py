"""Returns and advantages, and the baseline that a gradient-based method fits."""

from __future__ import annotations

import torch
from torch import Tensor

from dmrl_ray.losses.averages import standardized
from dmrl_ray.losses.shapes import check_shapes


def reverse_scan(x: Tensor, decay: Tensor) -> Tensor:
    """y[t] = x[t] + decay[t] * y[t + 1], with y[T] = 0.

    Args:
        x: (T, B).
        decay: (T, B).

    Returns:
        (T, B).
    """
    y = torch.empty_like(x)
    y[-1] = x[-1]
    for t in range(x.shape[0] - 2, -1, -1):
        torch.addcmul(x[t], decay[t], y[t + 1], out=y[t])
    return y


def generalized_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates.

        delta[t] = reward[t] + gamma * next_value[t] * (1 - terminated[t]) - value[t]
        A[t]     = delta[t] + gamma * gae_lambda * (1 - done[t]) * A[t + 1]

    A terminated step has no successor, so nothing is bootstrapped there. A truncated step does
    have one: it is bootstrapped, but the trace is cut, because ``A[t + 1]`` belongs to the next
    episode.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation", 2016, eq. 11-16 (arXiv:1506.02438).

    Args:
        reward: (T, B) float.
        value: (T, B) float, V(obs[t]).
        next_value: (T, B) float, V(next_obs[t]); ignored where ``terminated``.
        terminated: (T, B) bool, the MDP ended.
        truncated: (T, B) bool, a time limit ended the episode.
        gamma: discount per environment step, in [0, 1].
        gae_lambda: 0 gives one-step TD errors, 1 gives Monte Carlo returns minus ``value``.

    Returns:
        (T, B) advantages, not normalised and without gradient.

    Raises:
        ValueError: the tensors do not have one shape.
    """
    check_shapes(
        reward=reward,
        value=value,
        next_value=next_value,
        terminated=terminated,
        truncated=truncated,
    )
    with torch.no_grad():
        delta = reward + gamma * next_value * ~terminated - value
        done = terminated | truncated
        return reverse_scan(delta, gamma * gae_lambda * (~done).to(delta.dtype))


def vtrace(
    ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    rho_bar: float,
    c_bar: float,
) -> tuple[Tensor, Tensor]:
    """Value targets and advantages of one policy on what another policy did.

        rho[t], c[t] = min(rho_bar, ratio[t]), gae_lambda * min(c_bar, ratio[t])
        delta[t]     = reward[t] + gamma * next_value[t] * (1 - terminated[t]) - value[t]
        above[t]     = rho[t] * delta[t] + gamma * c[t] * (1 - done[t]) * above[t + 1]
        target[t]    = value[t] + above[t]
        A[t]         = rho[t] * (delta[t] + gamma * gae_lambda * (1 - done[t]) * above[t + 1])

    With every ratio 1 and neither bound below it, A is `generalized_advantage` and the target its
    sum with the value. Ends of episodes bootstrap and cut the trace as they do there. `rho_bar`
    decides which policy's values are learned, `c_bar` only how fast.

    Source: Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
    Actor-Learner Architectures", 2018, eq. 1, remark 2 and section 4.2 (arXiv:1802.01561). With a
    lambda below 1 the advantage's successor value is mixed like the trace, which the paper leaves
    open.

    Args:
        ratio: (T, B) probability of the action under the policy being trained, over that under
            the policy that acted.
        reward: (T, B) float.
        value: (T, B) float, V(obs[t]).
        next_value: (T, B) float, V(next_obs[t]); ignored where ``terminated``.
        terminated: (T, B) bool, the MDP ended.
        truncated: (T, B) bool, a time limit ended the episode.
        gamma: discount per environment step, in [0, 1].
        gae_lambda: shortens the traces; 1 in the paper.
        rho_bar: bound of the ratio that weighs a step's own error.
        c_bar: bound of the ratio that carries later errors back.

    Returns:
        (T, B) value targets and (T, B) advantages, not normalised and without gradient.

    Raises:
        ValueError: the tensors do not have one shape.
    """
    check_shapes(
        ratio=ratio,
        reward=reward,
        value=value,
        next_value=next_value,
        terminated=terminated,
        truncated=truncated,
    )
    with torch.no_grad():
        rho, c = ratio.clamp_max(rho_bar), gae_lambda * ratio.clamp_max(c_bar)
        delta = reward + gamma * next_value * ~terminated - value
        going_on = gamma * (~(terminated | truncated)).to(delta.dtype)
        above = reverse_scan(rho * delta, going_on * c)
        later = torch.cat([above[1:], torch.zeros_like(above[:1])])
        return value + above, rho * (delta + gae_lambda * going_on * later)


def trial_advantage(
    reward: Tensor,
    value: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Generalised advantages of whole trials: returns run across the episode ends inside.

    Learning in one episode is rewarded in the next, so an episode's end cuts nothing; only the
    trial's end does, and nothing is bootstrapped there. This is the one place that decides what
    cuts the returns of memory-based methods.

    Source: Duan et al., "RL^2: Fast Reinforcement Learning via Slow Reinforcement Learning",
    2016, section 2.2 (arXiv:1611.02779).

    Args:
        reward: (T, B) float, all steps of the trial.
        value: (T, B) float.
        gamma: discount per environment step, in [0, 1].
        gae_lambda: as in `generalized_advantage`.
        mask: (T, B) bool, steps that count, none of which follows one that does not; a trial ends
            with the last of them. None is all.

    Returns:
        (T, B) advantages, not normalised and without gradient.
    """
    end = torch.zeros_like(value, dtype=torch.bool)
    end[-1] = True
    if mask is not None:
        end[:-1] = mask[:-1] & ~mask[1:]
    next_value = torch.cat([value[1:], torch.zeros_like(value[:1])])
    return generalized_advantage(
        reward,
        value,
        next_value,
        end,
        torch.zeros_like(end),
        gamma=gamma,
        gae_lambda=gae_lambda,
    )


def linear_baseline(
    obs: Tensor,
    reward: Tensor,
    done: Tensor,
    *,
    gamma: float,
    mask: Tensor | None = None,
    ridge: float = 1e-5,
) -> Tensor:
    """Values of a time-dependent linear regression on discounted returns, fitted per task.

    Features are the observation, its square, the step within the episode over 100, to the powers
    1, 2 and 3, and one.

    Source: Duan et al., "Benchmarking Deep Reinforcement Learning for Continuous Control", 2016,
    supplement section 2 (arXiv:1604.06778).

    Args:
        obs: (T, N, E, D): N tasks with E environments each.
        reward: (T, N, E).
        done: (T, N, E) bool; the returns after a rollout's last step count as 0.
        gamma: discount per environment step.
        mask: (T, N, E) bool, steps to fit; None is all.
        ridge: weight of the squared coefficients.

    Returns:
        (T, N, E) values, without gradient.

    Raises:
        ValueError: the tensors do not fit together.
    """
    check_shapes(reward=reward, done=done, **{"obs[..., 0]": obs[..., 0]})
    with torch.no_grad():
        steps, tasks, envs = reward.shape
        flat = (steps, tasks * envs)
        running = (~done).to(reward.dtype).reshape(flat)
        returns = reverse_scan(reward.reshape(flat), gamma * running).reshape(reward.shape)
        index = torch.zeros_like(reward)
        for t in range(1, steps):
            index[t] = (index[t - 1] + 1) * ~done[t - 1]
        clock = (index / 100.0).unsqueeze(-1)
        scaled = obs.to(reward.dtype).clamp(-10.0, 10.0)
        ones = torch.ones_like(clock)
        x = torch.cat([scaled, scaled**2, clock, clock**2, clock**3, ones], -1)  # (T, N, E, F)
        x = x.transpose(0, 1).reshape(tasks, steps * envs, -1).double()
        y = returns.transpose(0, 1).reshape(tasks, steps * envs, 1).double()
        fitted = x
        if mask is not None:
            fitted = x * mask.transpose(0, 1).reshape(tasks, steps * envs, 1)
        gram = fitted.mT @ x + ridge * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        weights = torch.linalg.solve(gram, fitted.mT @ y)
        value = (x @ weights).reshape(tasks, steps, envs).transpose(0, 1)
        return value.to(reward.dtype)


def fitted_advantage(
    obs: Tensor,
    reward: Tensor,
    done: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Advantages over a linear baseline, both fitted and standardised per task.

    A fitted baseline knows nothing beyond a time limit, so returns end where episodes do. An
    episode that the last step cuts has no return yet: the baseline is fitted without it, and is the
    bootstrap value of what comes after the cut; before any episode of a task has ended, returns
    end at the cut.

    Source: the baseline and the standardised advantages of the inner loop in Finn et al.,
    "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017, appendix A.2
    (arXiv:1703.03400); the bootstrap at a cut is ours.

    Args:
        obs: (T + 1, N, E, D): N tasks with E environments each. The last row follows the last step.
        reward: (T, N, E).
        done: (T, N, E) bool.
        gamma: discount per environment step.
        gae_lambda: as in `generalized_advantage`.
        mask: (T, N, E) bool, steps that count; None is all.

    Returns:
        (T, N, E) advantages, with mean 0 and standard deviation 1 in each task; no gradient.

    Raises:
        ValueError: the tensors do not fit together.
    """
    cut = ~done[-1] if mask is None else ~done[-1] & mask[-1]  # (N, E)
    bootstrapped = cut & done.any(0).any(-1, keepdim=True)
    if bootstrapped.any():
        fitted = done.flip(0).cummax(0).values.flip(0) | ~bootstrapped
        fitted = fitted if mask is None else fitted & mask
        # What follows the cut has a value, but is not fitted.
        longer = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (reward, done, fitted))
        reward_to_fit, done_to_fit, fitted = longer
        value = linear_baseline(obs, reward_to_fit, done_to_fit, gamma=gamma, mask=fitted)
        value, last_value = value[:-1], value[-1:] * bootstrapped
    else:
        value = linear_baseline(obs[:-1], reward, done, gamma=gamma, mask=mask)
        last_value = torch.zeros_like(value[:1])
    next_value = torch.cat([value[1:], last_value])
    never = torch.zeros_like(done)
    advantage = generalized_advantage(
        reward, value, next_value, done, never, gamma=gamma, gae_lambda=gae_lambda
    )
    return standardized(advantage, mask, dim=(0, 2))


def fitted_trial_advantage(
    reward: Tensor, *, gamma: float, gae_lambda: float, mask: Tensor | None = None
) -> Tensor:
    """Advantages of whole trials over a linear baseline, both fitted to all tasks together.

    Returns run to the trial's end (`trial_advantage`). The baseline sees the time and the mean
    reward of the trial so far, also for each step that is left: most of what returns differ by is
    how good a task is.

    Args:
        reward: (T, B) float, all steps of the trial.
        gamma: discount per environment step, in [0, 1].
        gae_lambda: as in `generalized_advantage`.
        mask: (T, B) bool, as in `trial_advantage`; None is all.

    Returns:
        (T, B) advantages with mean 0 and standard deviation 1; no gradient.
    """
    if mask is not None:
        reward = reward * mask
    steps = torch.arange(len(reward), device=reward.device).unsqueeze(-1)
    mean_reward = (reward.cumsum(0) - reward) / steps.clamp_min(1)
    features = torch.stack([mean_reward, mean_reward * (1 - steps / len(reward))], -1)
    value = linear_baseline(
        features.unsqueeze(1),
        reward.unsqueeze(1),
        torch.zeros_like(reward, dtype=torch.bool).unsqueeze(1),
        gamma=gamma,
        mask=None if mask is None else mask.unsqueeze(1),
    ).squeeze(1)
    advantage = trial_advantage(reward, value, gamma=gamma, gae_lambda=gae_lambda, mask=mask)
    return standardized(advantage, mask)
