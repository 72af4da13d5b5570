"""Streams adapt by plain gradient steps, each on parameters of its own."""

import numpy as np
import pytest
import torch

from dmrl_ray.algorithms.online import _step, live_through
from dmrl_ray.algorithms.task_params import fitted_advantage, per_task, task_gradients
from dmrl_ray.config import Adapt, Component, RolloutSettings
from dmrl_ray.envs.point_goal import PointGoal
from dmrl_ray.rollout import Sampler
from dmrl_ray.spec import JobSpec, build

HORIZON = 5


def make_algorithm(algorithm="ppo", encoder=None):
    encoder = encoder or {"type": "mlp", "sizes": [8]}
    parts = (
        {"type": "point_goal", "horizon": HORIZON},
        {"type": "actor_critic", "encoder": encoder},
        algorithm,
    )
    parts = (Component.model_validate(part) for part in parts)
    return build(JobSpec("s", "s", 0, *parts, RolloutSettings(num_envs=20))).algorithm


def make_streams(num_streams, num_tasks, seed=0):
    family = PointGoal(PointGoal.Config(horizon=HORIZON))
    tasks = family.sample(np.random.default_rng(seed), num_streams * num_tasks, "test")
    return [tasks[i::num_streams] for i in range(num_streams)]


def make_settings(**settings):
    defaults = dict(init_from="x", optimizer="sgd", episodes_per_update=3, episodes_per_task=2)
    return Adapt.model_validate(defaults | settings)


def make_sampler(algorithm, streams, settings, seed=0):
    parallel = settings.episodes_per_update if settings.optimizer != "none" else 1
    sampler = Sampler(
        algorithm.distribution,
        len(streams) * parallel,
        memory_spans_trial=algorithm.memory_spans_trial,
    )
    sampler.start(np.random.default_rng(seed), 0)
    return sampler


def one_rollout(algorithm, num_streams=2, seed=0):
    settings, streams = make_settings(), make_streams(num_streams, 1)
    sampler = make_sampler(algorithm, streams, settings, seed)
    sampler.begin_trial([s[0] for s in streams], algorithm.policy)
    return sampler.rollout(algorithm.policy, HORIZON, with_value=False)


def gradients_of(algorithm, params, rollout):
    rollout.advantage = fitted_advantage([rollout], 2, gamma=0.99, gae_lambda=1.0)
    tensors = rollout.map(torch.from_numpy)
    return task_gradients(algorithm.policy, params, tensors, list(params), create_graph=False)


def test_an_sgd_step_by_hand():
    algorithm = make_algorithm()
    rollout, settings = one_rollout(algorithm), make_settings(lr=0.3)
    before = per_task(algorithm.policy, 2)
    gradients = gradients_of(algorithm, before, rollout)
    after = _step(algorithm, dict(before), rollout, settings, {}, 1)
    for name in before:
        torch.testing.assert_close(after[name], before[name] - 0.3 * gradients[name])


def test_adamw_is_torchs_over_three_steps():
    algorithm = make_algorithm()
    settings = make_settings(optimizer="adamw", lr=0.05)
    params = per_task(algorithm.policy, 2)
    copies = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    reference = torch.optim.AdamW(copies.values(), lr=0.05, weight_decay=0.01)
    moments = {}
    for step in range(1, 4):
        rollout = one_rollout(algorithm, seed=step)
        for name, gradient in gradients_of(algorithm, params, rollout).items():
            copies[name].grad = gradient.clone()
        params = _step(algorithm, params, rollout, settings, moments, step)
        reference.step()
        for name in params:
            torch.testing.assert_close(params[name], copies[name].detach(), rtol=1e-5, atol=1e-6)


def test_only_trainable_parts_move():
    algorithm = make_algorithm()
    before = per_task(algorithm.policy, 2)
    settings = make_settings(trainable=("policy_head",))
    after = _step(algorithm, dict(before), one_rollout(algorithm), settings, {}, 1)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("policy_head.")}


def test_the_policy_itself_does_not_move():
    algorithm, settings = make_algorithm(), make_settings(lr=1.0)
    streams = make_streams(2, 2)
    before = {n: x.clone() for n, x in algorithm.policy.state_dict().items()}
    live_through(algorithm, make_sampler(algorithm, streams, settings), streams, settings)
    for name, x in algorithm.policy.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_streams_do_not_influence_each_other(optimizer):
    # The second stream's tasks change; the first stream's rewards stay (one stream of noise for
    # all columns, and point_goal itself draws nothing).
    algorithm, settings = make_algorithm(), make_settings(optimizer=optimizer, lr=0.5)
    streams, others = make_streams(2, 3), make_streams(2, 3, seed=1)
    rewards = [
        live_through(algorithm, make_sampler(algorithm, s, settings), s, settings)
        for s in (streams, [streams[0], others[1]])
    ]
    np.testing.assert_allclose(rewards[0][..., 0], rewards[1][..., 0], rtol=1e-5)
    assert not np.allclose(rewards[0][..., 1], rewards[1][..., 1])


def test_rewards_are_told_per_change_step_and_stream():
    algorithm, settings = make_algorithm(), make_settings(episodes_per_task=2)
    streams = make_streams(2, 3)
    sampler = make_sampler(algorithm, streams, settings)
    rewards = live_through(algorithm, sampler, streams, settings)
    assert rewards.shape == (3, 2 * HORIZON, 2)
    rows = sampler.take_episodes()
    for n, tasks in enumerate(streams):
        for k, task in enumerate(tasks):
            mine = np.array([t.id == task.id for t in rows["task"]])
            assert set(rows["column"][mine] // 3) == {n}
            total = rows["return"][mine].sum() / 3  # three parallel columns
            assert rewards[k, :, n].sum() == pytest.approx(total, rel=1e-5)


def test_a_gradient_step_raises_what_follows_it():
    algorithm, settings = make_algorithm(), make_settings(lr=0.1, episodes_per_update=40)
    settings = settings.model_copy(update={"episodes_per_task": 6})
    streams = make_streams(8, 1)
    sampler = make_sampler(algorithm, streams, settings)
    rewards = live_through(algorithm, sampler, streams, settings)
    per_episode = rewards[0].reshape(6, HORIZON, 8).sum(1).mean(-1)
    assert per_episode[-1] > per_episode[0] + 0.1


def test_a_policy_with_memory_takes_the_steps_of_its_fused_kernel():
    algorithm = make_algorithm("ppo", {"type": "lstm", "size": 4})
    policy, settings = algorithm.policy, make_settings()
    fused = {n: p for n, p in policy.named_parameters() if n.startswith(("encoder", "policy"))}
    streams = make_streams(2, 1)
    sampler = make_sampler(algorithm, streams, settings)
    live_through(algorithm, sampler, streams, settings)
    sampler.begin_trial([s[0] for s in streams], policy)
    rollout = sampler.rollout(policy, HORIZON, with_value=False)
    gradients = gradients_of(algorithm, per_task(policy, 2), rollout)
    policy.encoder.plain = False
    tensors = rollout.map(torch.from_numpy)
    pi = policy(tensors.obs[:-1], None, tensors.initial_state, tensors.reset_state)[0]
    weighed = policy.policy_head.log_prob(pi, tensors.action) * tensors.advantage
    for n in range(2):
        loss = -weighed[:, tensors.task_index == n].mean()
        own = torch.autograd.grad(loss, list(fused.values()), retain_graph=True)
        for name, expected in zip(fused, own, strict=True):
            torch.testing.assert_close(gradients[name][n], expected, rtol=1e-4, atol=1e-6)


def memory_at_the_change(algorithm):
    """Reset flags, memory and previous reward that the first step after a change starts from."""
    settings = make_settings(optimizer="none", episodes_per_task=1)
    streams = make_streams(3, 2)
    sampler = make_sampler(algorithm, streams, settings)
    live_through(algorithm, sampler, [s[:1] for s in streams], settings)
    sampler.set_tasks([s[1] for s in streams])
    sampler.begin_episodes(forget=not algorithm.memory_spans_trial)
    return sampler.rollout(algorithm.policy, 1, with_value=False)


def test_a_memory_that_spans_trials_lives_over_a_change():
    rollout = memory_at_the_change(make_algorithm("rl2", {"type": "lstm", "size": 8}))
    assert not rollout.reset_state.any()
    assert all((leaf != 0).any() for leaf in rollout.initial_state)
    assert (rollout.previous_reward != 0).all()
    assert rollout.previous_done.all()


def test_a_memory_of_episodes_is_empty_after_a_change():
    rollout = memory_at_the_change(make_algorithm("ppo", {"type": "lstm", "size": 8}))
    assert rollout.reset_state.all()
    assert (rollout.previous_reward == 0).all()


def test_a_change_that_nobody_is_told_of_looks_like_any_episodes_end():
    # Two tasks that are the same one: with the memory going on, a change is not noticed at all.
    algorithm = make_algorithm("rl2", {"type": "lstm", "size": 8})
    ((task,),) = make_streams(1, 1)
    runs = []
    for stream, episodes in (([task, task], 2), ([task], 4)):
        settings = make_settings(optimizer="none", episodes_per_task=episodes)
        sampler = make_sampler(algorithm, [stream], settings)
        runs.append(live_through(algorithm, sampler, [stream], settings).reshape(-1))
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize(
    ("algorithm", "encoder"),
    [("rl2", {"type": "lstm", "size": 8}), ("rl2", {"type": "mlp", "sizes": [8]})],
)
def test_gradient_steps_on_a_policy_they_cannot_train_are_refused(algorithm, encoder):
    algorithm, settings = make_algorithm(algorithm, encoder), make_settings()
    streams = make_streams(2, 1)
    sampler = make_sampler(algorithm, streams, settings)
    with pytest.raises(ValueError, match=r"optimizer.*'sgd'.*none"):
        live_through(algorithm, sampler, streams, settings)


def test_a_trainable_part_that_no_parameter_has_is_refused():
    algorithm, settings = make_algorithm(), make_settings(trainable=("value_head",))
    streams = make_streams(2, 1)
    sampler = make_sampler(algorithm, streams, settings)
    with pytest.raises(ValueError, match=r"trainable.*'value_head'.*encoder, policy_head"):
        live_through(algorithm, sampler, streams, settings)
