"""One `adapt` for every method, called by collection, evaluation and streams of tasks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmrl_ray.algorithms.adaptation import play_stream
from dmrl_ray.algorithms.base import continued
from dmrl_ray.config.schema import Component, ContinuedTraining, RolloutSettings
from dmrl_ray.envs.point_goal import PointGoal
from dmrl_ray.jobs.spec import JobSpec, build
from dmrl_ray.learn.per_task import clip_by_norm, per_task, surrogate_loss, task_gradients
from dmrl_ray.rollout.sampler import Sampler

HORIZON = 5


def make_algorithm(algorithm="ppo", encoder=None):
    encoder = encoder or {"type": "mlp", "hidden_sizes": [8]}
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


def make_continued(algorithm=None, **settings):
    settings = ContinuedTraining.model_validate({"episodes": 3} | settings)
    return continued(algorithm or make_algorithm(), 0.99, settings)


def make_sampler(adaptation, num_streams, seed=0):
    family = PointGoal(PointGoal.Config(horizon=HORIZON))
    spans = adaptation.memory_spans_trial
    columns = num_streams * adaptation.envs_per_task
    sampler = Sampler(family, columns, memory_spans_trial=spans)
    sampler.start(np.random.default_rng(seed), 0)
    return sampler


def one_rollout(adaptation, seed=0):
    """What agents on two tasks play before they adapt, as tensors with advantages."""
    sampler = make_sampler(adaptation, 2, seed)
    agent = adaptation.begin(sampler, [s[0] for s in make_streams(2, 1)])
    (rollout,) = adaptation.play(sampler, agent, 1)
    return agent, rollout.map(torch.from_numpy)


def gradients_of(policy, params, rollout):
    return task_gradients(surrogate_loss(policy, params, rollout), params, ("",))


def streamed(adaptation, streams, episodes=2, seed=0):
    """(K, U, N) rewards of streams, mean over parallel copies."""
    sampler = make_sampler(adaptation, len(streams), seed)
    parts = []
    for trial in play_stream(adaptation, sampler, streams, episodes):
        reward = np.concatenate([rollout.reward for rollout in trial])
        parts.append(reward.reshape(len(reward), len(streams), -1).mean(-1))
    return np.stack(parts), sampler


def test_an_sgd_step_by_hand():
    adaptation = make_continued(lr=0.3, weight_decay=0.5)
    agent, rollout = one_rollout(adaptation)
    before = agent.state.params
    gradients = gradients_of(adaptation.policy, before, rollout)
    after = adaptation.adapt(agent.state, rollout).params
    for name in before:
        expected = before[name] - 0.3 * (gradients[name] + 0.5 * before[name])
        torch.testing.assert_close(after[name], expected)


def test_adamw_is_torchs_over_three_steps():
    adaptation = make_continued(optimizer="adamw", lr=0.05, weight_decay=0.01)
    state = one_rollout(adaptation)[0].state
    copies = {n: torch.nn.Parameter(p.detach().clone()) for n, p in state.params.items()}
    reference = torch.optim.AdamW(copies.values(), lr=0.05, weight_decay=0.01)
    for step in range(1, 4):
        _, rollout = one_rollout(adaptation, seed=step)
        gradients = gradients_of(adaptation.policy, state.params, rollout)
        for name, gradient in gradients.items():
            copies[name].grad = gradient.clone()
        state = adaptation.adapt(state, rollout)
        reference.step()
        for name, param in state.params.items():
            torch.testing.assert_close(param, copies[name].detach(), rtol=1e-5, atol=1e-6)


def test_only_trainable_parts_move():
    adaptation = make_continued(trainable=("policy_head",))
    agent, rollout = one_rollout(adaptation)
    before, after = agent.state.params, adaptation.adapt(agent.state, rollout).params
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("policy_head.")}


def test_the_policy_itself_does_not_move():
    adaptation = make_continued(lr=1.0)
    before = {n: x.clone() for n, x in adaptation.policy.state_dict().items()}
    streamed(adaptation, make_streams(2, 2))
    for name, x in adaptation.policy.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_streams_do_not_influence_each_other(optimizer):
    # The second stream's tasks change; the first stream's rewards stay (one stream of noise for
    # all environments, and point_goal itself draws nothing).
    adaptation = make_continued(optimizer=optimizer, lr=0.5)
    streams, others = make_streams(2, 3), make_streams(2, 3, seed=1)
    rewards = [streamed(adaptation, s)[0] for s in (streams, [streams[0], others[1]])]
    np.testing.assert_allclose(rewards[0][..., 0], rewards[1][..., 0], rtol=1e-5)
    assert not np.allclose(rewards[0][..., 1], rewards[1][..., 1])


def test_parameters_last_over_a_change_and_steps_are_counted():
    adaptation = make_continued()
    _, sampler = streamed(adaptation, make_streams(2, 3), episodes=2)
    rows = sampler.take_episodes()
    assert sorted(set(rows["adaptation_step"])) == [0, 1, 2, 3, 4, 5]
    # Three parallel copies of five steps; a new task is one that nothing is known of.
    assert sorted(set(rows["experience_steps"])) == [0, 15]
    assert sorted(set(rows["experience_episodes"])) == [0, 3]


def test_a_gradient_step_raises_what_follows_it():
    adaptation = make_continued(lr=0.1, episodes=40)
    rewards, _ = streamed(adaptation, make_streams(8, 1), episodes=6)
    per_episode = rewards[0].reshape(6, HORIZON, 8).sum(1).mean(-1)
    assert per_episode[-1] > per_episode[0] + 0.1


def test_who_is_frozen_plays_as_if_every_episode_were_the_first():
    adaptation = make_continued(lr=1.0)
    sampler = make_sampler(adaptation, 2)
    agent = adaptation.begin(sampler, [s[0] for s in make_streams(2, 1)])
    before = {n: p.clone() for n, p in agent.state.params.items()}
    trial = list(adaptation.play(sampler, agent, 3, frozen=True))
    assert not any(r.adaptation_step.any() for r in trial)
    assert all(torch.equal(before[n], p) for n, p in agent.state.params.items())


@pytest.mark.parametrize(
    ("algorithm", "encoder"),
    [
        ({"type": "maml", "episodes_per_task": 4, "inner_lr": 0.7}, None),
        ({"type": "maml", "episodes_per_task": 4, "trainable": ["policy_head"]}, None),
        ({"type": "meta_sgd", "episodes_per_task": 4}, None),
        ({"type": "reptile", "episodes_per_task": 4}, None),
    ],
)
def test_a_stream_adapts_by_the_methods_own_steps(algorithm, encoder):
    # The parameters on the second round of a stream are those of the method's inner step.
    algorithm = make_algorithm(algorithm, encoder)
    adaptation = algorithm.own_adaptation()
    sampler = make_sampler(adaptation, 2)
    agent = adaptation.begin(sampler, [s[0] for s in make_streams(2, 1)])
    first, _ = adaptation.play(sampler, agent, 2)
    expected = algorithm.adapt(per_task(algorithm.policy, 2), first.map(torch.as_tensor))
    for name, param in agent.state.items():
        torch.testing.assert_close(param, expected[name], rtol=0, atol=0)
    moved = {n for n, p in agent.state.items() if not torch.equal(p[0], p[1])}
    assert moved == {n for n in expected if n.startswith(algorithm.config.trainable)}


def test_only_the_context_of_cavia_adapts_in_a_stream():
    parts = (
        {"type": "point_goal", "horizon": HORIZON},
        {"type": "actor_critic", "context": 3, "encoder": {"type": "mlp", "hidden_sizes": [8]}},
        {"type": "cavia", "episodes_per_task": 4},
    )
    parts = (Component.model_validate(part) for part in parts)
    algorithm = build(JobSpec("s", "s", 0, *parts, RolloutSettings(num_envs=20))).algorithm
    sampler = make_sampler(algorithm, 2)
    agent = algorithm.begin(sampler, [s[0] for s in make_streams(2, 1)])
    list(algorithm.play(sampler, agent, 2))
    assert {n for n, p in agent.state.items() if not torch.equal(p[0], p[1])} == {"context"}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_that_goes_on_by_its_own_optimiser_takes_the_steps_of_training(optimizer):
    # Gradients that are clipped and one that is not; some so small that Adam's eps is felt.
    settings = {"optimizer": optimizer, "lr": 0.3, "weight_decay": 0.01}
    algorithm = make_algorithm({"type": "ppo", **settings})
    algorithm.prepare_training()
    algorithm.policy.policy_head.log_std.data.fill_(1.0)  # as large as it may be
    adaptation = algorithm.own_adaptation()
    state = adaptation.initial_state(None, 1)
    named = {n: p for n, p in algorithm.policy.named_parameters() if n in state.params}
    state = replace(state, params={n: p.detach().clone() for n, p in state.params.items()})
    for size in (1.0, 10.0, 1e-6):
        gradients = {n: size * torch.randn_like(p) for n, p in named.items()}
        gradients["policy_head.log_std"] = torch.full((2,), -size)  # and would get larger
        algorithm.step_optimizer(sum((named[n] * g).sum() for n, g in gradients.items()))
        state = adaptation.step(state, {n: g.unsqueeze(0) for n, g in gradients.items()})
        for name, parameter in named.items():
            torch.testing.assert_close(state.params[name][0], parameter.detach(), msg=name)


def test_the_gradient_of_each_task_is_clipped_by_itself():
    gradients = {"a": torch.tensor([[3.0], [0.3]]), "b": torch.tensor([[4.0], [0.4]])}
    found = clip_by_norm(gradients, 1.0)
    torch.testing.assert_close(found["a"], torch.tensor([[0.6], [0.3]]))
    torch.testing.assert_close(found["b"], torch.tensor([[0.8], [0.4]]))


def test_a_policy_with_memory_takes_the_steps_of_its_fused_kernel():
    algorithm = make_algorithm("ppo", {"type": "lstm", "hidden_size": 4})
    policy = algorithm.policy
    fused = {n: p for n, p in policy.named_parameters() if n.startswith(("encoder", "policy"))}
    adaptation = make_continued(algorithm)
    agent, tensors = one_rollout(adaptation)
    gradients = gradients_of(policy, agent.state.params, tensors)
    policy.encoder.plain = False
    pi = policy(tensors.obs[:-1], None, tensors.initial_memory, tensors.reset)[0]
    weighed = policy.policy_head.log_prob(pi, tensors.action) * tensors.advantage
    for n in range(2):
        loss = -weighed[:, tensors.task_index == n].mean()
        own = torch.autograd.grad(loss, list(fused.values()), retain_graph=True)
        for name, expected in zip(fused, own, strict=True):
            torch.testing.assert_close(gradients[name][n], expected, rtol=1e-4, atol=1e-6)


def at_the_change(algorithm):
    """Reset flags, memory and previous reward that the first step after a change starts from."""
    sampler = make_sampler(algorithm, 3)
    *_, last = play_stream(algorithm, sampler, make_streams(3, 2), 1)
    return last[0]


def test_a_memory_that_spans_trials_lives_over_a_change():
    rollout = at_the_change(make_algorithm("rl2", {"type": "lstm", "hidden_size": 8}))
    assert not rollout.reset.any()
    assert all((leaf != 0).any() for leaf in rollout.initial_memory)
    assert (rollout.previous_reward != 0).all()
    assert rollout.previous_done.all()


def test_a_memory_of_episodes_is_empty_after_a_change():
    rollout = at_the_change(make_algorithm("ppo", {"type": "lstm", "hidden_size": 8}))
    assert rollout.reset[0].all()
    assert (rollout.previous_reward == 0).all()


def test_a_change_that_nobody_is_told_of_looks_like_any_episodes_end():
    # Two tasks that are the same one: with the memory going on, a change is not noticed at all.
    algorithm = make_algorithm("rl2", {"type": "lstm", "hidden_size": 8})
    ((task,),) = make_streams(1, 1)
    runs = [streamed(algorithm, [s], n)[0] for s, n in (([task, task], 2), ([task], 4))]
    np.testing.assert_array_equal(*(run.reshape(-1) for run in runs))


def test_a_policy_that_gradient_steps_cannot_train_is_refused():
    algorithm = make_algorithm("rl2", {"type": "transformer", "hidden_size": 8, "heads": 1})
    with pytest.raises(ValueError, match=r"network.encoder: gradient steps cannot adapt"):
        make_continued(algorithm)


def test_a_trainable_part_that_no_parameter_has_is_refused():
    with pytest.raises(ValueError, match=r"by\.trainable.*'value_head'.*encoder, policy_head"):
        make_continued(trainable=("value_head",))
