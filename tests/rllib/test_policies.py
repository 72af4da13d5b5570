"""An exported policy computes the same in RLlib, can be trained there, and is read back."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from cases import play
from ray.rllib.algorithms.ppo import PPOConfig

from dmrl_ray.config.loading import load_config
from dmrl_ray.config.schema import RunConfig
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.spec import build, get_weights, job_spec, set_weights
from dmrl_ray.jobs.transfer import rllib_start
from dmrl_ray.rllib import register
from dmrl_ray.rllib.environments import EnvSettings, TaskEnv
from dmrl_ray.rllib.policies import ActorCriticModule, export_policy, exported, module_spec
from dmrl_ray.store.commit_records import newest_commit
from dmrl_ray.store.files import LocalFiles, load_arrays
from dmrl_ray.types import random_stream

KINDS = {
    "feed_forward": ("point_goal", "{type: mlp, hidden_sizes: [16]}", "{type: ppo, num_steps: 20}"),
    "recurrent": ("cartpole", "{type: lstm, hidden_size: 8}", "{type: ppo, num_steps: 32}"),
    "over_trials": ("bandit", "{type: gru, hidden_size: 8}", "{type: rl2}"),
    "squashed": ("point_goal", "{type: mlp, hidden_sizes: [16]}", "{type: sac, num_steps: 20}"),
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """By kind: the run folder, and its policy exported."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            run = play(folder / "run", *KINDS[kind])
            export_policy(run, folder / "policy")
            made[kind] = (run, folder / "policy")
        return made[kind]

    return of


def program_of(run):
    """What trained the run's policy, with its best weights."""
    program = build(job_spec(load_config(run / "config.yaml"), "meta"))
    set_weights(program.policy, load_arrays(LocalFiles(run), newest_commit(run).files["meta.best"]))
    return program


def rollout_of(program, num_steps, with_value=True):
    sampler = program.sampler(6)
    sampler.start(random_stream(0, "test"), 0)
    tasks = program.distribution.sample(np.random.default_rng(0), 6, "test")
    sampler.begin_trial(tasks, program.policy)
    return sampler.rollout(program.policy, num_steps, with_value=with_value)


@pytest.mark.parametrize("kind", ["feed_forward", "squashed"])
def test_a_policy_without_memory_is_the_same_function_in_rllib(kind, policies):
    run, path = policies(kind)
    program = program_of(run)
    rollout = rollout_of(program, 20, kind != "squashed")
    obs = torch.from_numpy(rollout.obs[:-1])
    module = ActorCriticModule.from_checkpoint(str(path))
    batch = {"obs": obs.flatten(0, 1)}
    out = module.forward_exploration(batch)
    pi, _, _ = program.policy(obs)
    torch.testing.assert_close(out["action_dist_inputs"], pi.flatten(0, 1).detach())
    if kind != "squashed":
        ours = torch.from_numpy(rollout.value).flatten()
        torch.testing.assert_close(module.compute_values(batch).detach(), ours)
    distribution = module.get_exploration_action_dist_cls().from_logits(pi)
    log_prob = distribution.logp(torch.from_numpy(rollout.action))
    torch.testing.assert_close(
        log_prob.detach(), torch.from_numpy(rollout.log_prob), atol=1e-4, rtol=1e-4
    )


def test_the_values_that_crossed_were_scaled(policies):
    policy = program_of(policies("feed_forward")[0]).policy
    assert policy.value_norm.std > 1.1
    assert policy.obs_norm.batches > 0


def test_a_policy_with_memory_is_the_same_function_in_rllib(policies):
    run, path = policies("recurrent")
    program = program_of(run)
    sampler_rollout = rollout_of(program, 9)
    assert not sampler_rollout.reset[1:].any()  # RLlib begins a sequence at every episode
    module = ActorCriticModule.from_checkpoint(str(path))
    obs = torch.from_numpy(sampler_rollout.obs[:-1]).transpose(0, 1)
    start = module.get_initial_state()
    state = {name: leaf.expand(6, -1) for name, leaf in start.items()}
    whole = module.forward_train({"obs": obs, "state_in": state})
    with torch.no_grad():
        pi, _, _ = program.policy(obs.transpose(0, 1), None, program.policy.initial_memory(6))
    torch.testing.assert_close(whole["action_dist_inputs"].detach(), pi.transpose(0, 1))
    values = module.compute_values({"obs": obs, "state_in": state}, whole["embeddings"])
    torch.testing.assert_close(values.detach(), torch.from_numpy(sampler_rollout.value).T)
    alone = module.compute_values({"obs": obs, "state_in": state})
    torch.testing.assert_close(alone, values)


def test_acting_step_by_step_in_rllib_equals_the_policy_on_the_sequence(policies):
    # The module acts in a trial as RLlib lets it, step by step; then the policy is shown the
    # same steps, with their predecessors, as one sequence.
    run, path = policies("over_trials")
    program = program_of(run)
    module = ActorCriticModule.from_checkpoint(str(path))
    settings = {"tasks": KINDS["over_trials"][0], "whole_trials": True, "previous": "parts"}
    env = TaskEnv(EnvSettings.model_validate(settings))
    obs, _ = env.reset(seed=0)
    state = {name: leaf[None] for name, leaf in module.get_initial_state().items()}
    logits, steps, over = [], [], False
    while not over:
        assert env.observation_space.contains(obs)
        shown = {name: torch.from_numpy(np.asarray(part))[None, None] for name, part in obs.items()}
        out = module.forward_inference({"obs": shown, "state_in": state})
        logits.append(out["action_dist_inputs"][0, 0])
        state = out["state_out"]
        action = int(logits[-1].argmax())
        following, reward, over, _, _ = env.step(action)
        steps.append((obs["obs"], action, reward, following["done"]))
        obs = following
    assert len(steps) == program.distribution.trial_steps
    obs, action, reward, done = (torch.from_numpy(np.array(x)) for x in zip(*steps, strict=True))
    previous = (after(-1, action), after(0.0, reward.float()), after(True, done.bool()))
    with torch.no_grad():
        pi, _, _ = program.policy(obs[:, None], previous, program.policy.initial_memory(1))
    torch.testing.assert_close(torch.stack(logits), pi[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_rllibs_ppo_continues_from_an_export_and_is_read_back(
    kind, policies, ray_instance, tmp_path
):
    run, path = policies(kind)
    seen = {"whole_trials": True, "previous": "parts"} if kind == "over_trials" else {}
    register(kind, KINDS[kind][0], **seen)
    config = (
        PPOConfig()
        .environment(kind)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        .rl_module(rl_module_spec=exported(path))
        .training(train_batch_size=200, minibatch_size=100, num_epochs=1)
        .debugging(seed=0, log_level="ERROR")
    )
    algorithm = config.build_algo()
    before = {f"policy.{name}": x for name, x in get_weights(program_of(run).policy).items()}
    acting = algorithm.get_module().get_state()
    for name in acting.keys() & before.keys():
        np.testing.assert_array_equal(acting[name], before[name])
    assert "policy.policy_head.layer.weight" in acting
    result = algorithm.train()
    algorithm.save_to_path(str(tmp_path / "trained"))
    assert np.isfinite(result["learners"]["default_policy"]["total_loss"])
    after = algorithm.get_module().get_state()
    algorithm.stop()
    moved = {name for name in acting if not np.array_equal(acting[name], after[name])}
    assert moved == {name for name in acting if "_norm." not in name}
    back = rllib_start(f"rllib:{tmp_path / 'trained'}", program_of(run).policy)
    assert "policy_head.layer.weight" in back.matched
    assert back.unused == [n for n in after if kind == "squashed" and ".value_" in n]
    for ours, theirs in back.matched.items():
        np.testing.assert_array_equal(back.weights[ours], after[theirs])


def after(first, x):
    """What was shown of x, (T, 1): each step's is the one before."""
    return torch.cat([torch.tensor([first], dtype=x.dtype), x[:-1]]).unsqueeze(1)


def test_policies_that_rllib_cannot_run_are_refused_in_one_sentence(tmp_path):
    def job(algorithm, network="actor_critic"):
        stage = {"type": "pretrain", "env_steps": 1}
        parts = {"tasks": "bandit", "algorithm": algorithm, "network": network}
        return job_spec(RunConfig.model_validate({**parts, "stages": {"meta": stage}}), "meta")

    with pytest.raises(ConfigError, match="stage 'meta': rllib:PPO has a network of its own"):
        module_spec(job("rllib:PPO"))
    with pytest.raises(ConfigError, match=r"not an exported policy: it has no dmrl_ray.json"):
        exported(tmp_path)
    spec = module_spec(job("ppo"))
    spec.observation_space = gym.spaces.Box(0, 1, (7,), np.float32)
    with pytest.raises(ValueError, match=r"expects observations \(1,\), .* has \(7,\)"):
        spec.build()
