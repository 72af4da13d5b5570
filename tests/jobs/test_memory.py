"""What a config would hold in memory is estimated, and refused, before any of it is taken."""

import resource
import time
from pathlib import Path

import pytest
import torch

from dmrl_ray.config.loading import locate_errors, parse_config
from dmrl_ray.control.checks import check
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.memory import (
    Part,
    estimate,
    group_limits,
    machine_bytes,
    refusal,
    size_text,
    summary,
)
from dmrl_ray.jobs.spec import job_spec, outline

CONFIG = """\
tasks: {point_goal: FAMILY}
network: {normalize_obs: false, normalize_value: false, encoder: ENCODER}
algorithm: ALGORITHM
rollout: {num_envs: 40}
learners: {device: cpu}
stages:
  meta: {type: pretrain, env_steps: 10}
  held_out: {type: evaluate, init_from: meta}
"""


def text(family="{type: point_goal}", encoder="mlp", algorithm="ppo"):
    whole = CONFIG.replace("{point_goal: FAMILY}", family)
    return whole.replace("ENCODER", encoder).replace("ALGORITHM", algorithm)


def sizes(*overrides, stage="meta", **parts):
    """What is sure of each part, by name, and the parts."""
    config = parse_config(text(**parts), "run.yaml", overrides)
    spec = job_spec(config, stage)
    found = estimate(outline(spec), spec, config.stages[stage])
    return {part.name: part.sure_bytes for part in found}, found


def test_weights_are_counted_with_gradients_and_moments():
    # Two encoders of 2 -> 10 (30 numbers), a policy head 10 -> 2 with 2 spreads (24), a value head
    # 10 -> 1 (11): 95 numbers of 4 bytes; weight, two copies of the gradient, two moments.
    held, _ = sizes(encoder="{type: mlp, hidden_sizes: [10]}")
    assert held["weights"] == 5 * 4 * 95
    held, _ = sizes(
        encoder="{type: mlp, hidden_sizes: [10]}", algorithm="{type: ppo, optimizer: sgd}"
    )
    assert held["weights"] == 3 * 4 * 95
    held, _ = sizes(encoder="{type: mlp, hidden_sizes: [10]}", stage="held_out")
    assert held["weights"] == 4 * 95


def test_frozen_weights_have_no_gradients():
    # The heads alone move: 35 of the 95 numbers.
    finetune = (
        "stages.held_out={type: finetune, init_from: meta, trainable: [policy_head, value_head]}"
    )
    held, _ = sizes(finetune, encoder="{type: mlp, hidden_sizes: [10]}", stage="held_out")
    assert held["weights"] == 4 * 95 + 4 * 4 * 35


def test_rollouts_are_counted_step_by_step_over_all_shards():
    # A step: 8 bytes of position, 8 of move, reward and log-probability, four flags: 28. They are
    # there as collected and as joined: 2 x 7 steps x 40 environments x 3 shards x 28.
    held, _ = sizes("rollout.shards=3", algorithm="{type: ppo, num_steps: 7}")
    assert held["rollouts"] == 2 * 7 * 40 * 3 * 28


def test_replay_is_counted_whole():
    # A step: two positions of 8 bytes, 8 of move, 4 of reward, three flags: 31.
    held, _ = sizes(algorithm="{type: sac, num_steps: 7, replay_trials: 500}")
    assert held["replay"] == 500 * 7 * 31


def test_each_task_has_parameters_of_its_own():
    # The actor has 54 numbers. Two shards of 40 environments, 20 a task, are 4 tasks; after two
    # inner steps they have two sets of parameters each, and a gradient.
    held, _ = sizes(
        encoder="{type: mlp, hidden_sizes: [10]}", algorithm="{type: maml, inner_steps: 2}"
    )
    assert held["tasks' parameters"] == 3 * 4 * 4 * 54


def test_heads_that_adapt_alone_are_all_that_tasks_have():
    # 24 numbers of the policy head; 4 tasks, one inner step and the gradient.
    held, _ = sizes(
        encoder="{type: mlp, hidden_sizes: [10]}",
        algorithm="{type: maml, trainable: [policy_head]}",
    )
    assert held["tasks' parameters"] == 2 * 4 * 4 * 24


def test_keys_and_values_of_a_context_are_memory():
    # 40 environments, 3 layers x keys and values x 50 steps x 8 numbers of 4 bytes.
    encoder = "{type: transformer, layers: 3, context: 50, hidden_size: 8, heads: 2}"
    held, _ = sizes(encoder=encoder, algorithm="rl2")
    assert held["memory"] == 40 * 3 * 2 * 50 * 8 * 4


def test_the_estimate_of_a_memory_is_what_it_takes():
    spec = job_spec(parse_config(text(encoder="transformer", algorithm="rl2"), "run.yaml"), "meta")
    encoder = outline(spec).policy.encoder.to_empty(device="cpu")
    with torch.no_grad():
        memory = encoder(
            torch.zeros(1, 3, 2), torch.zeros(1, 3, 4), encoder.initial_memory(3), None
        )[1]
    assert memory[0].nbytes == 3 * encoder.memory_bytes


def test_where_episodes_may_end_early_the_mask_alone_is_sure():
    # 40 environments, one trial of 500 steps at most: a byte a step.
    family = "{type: cartpole}"
    _, found = sizes(family=family, encoder="gru", algorithm="rl2")
    (rollouts,) = (part for part in found if part.name == "rollouts")
    assert rollouts.sure_bytes == 500 * 40 < rollouts.about_bytes


PARTS = [
    Part("weights", "5 weights", ((7, "network.encoder.hidden_sizes"),), 3 << 30, 4 << 30),
    Part(
        "rollouts",
        "9 steps",
        ((2, "algorithm.num_steps"), (6, "rollout.num_envs")),
        5 << 30,
        10 << 30,
    ),
]


def test_what_fits_is_not_refused():
    assert refusal(PARTS, 8 << 30) is None


def test_the_largest_factor_of_the_largest_part_is_to_be_lowered():
    assert refusal(PARTS, (8 << 30) - 1) == (
        "rollout.num_envs: 9 steps take 5.0 GiB, of 8.0 GiB in all, and this machine has 8.0 GiB "
        "of memory; lower it"
    )


def test_a_summary_has_the_largest_part_first():
    assert summary(PARTS) == "about 14.0 GiB (rollouts 10.0, weights 4.0)"
    assert size_text(1023) == "1,023.0 B"
    assert size_text(1 << 20) == "1.0 MiB"


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/pod/box", "pod/box/memory.max"),
        ("0::/pod/box", "memory.max"),
        ("4:memory:/pod/box", "memory/pod/memory.limit_in_bytes"),
        ("4:memory:/elsewhere", "memory/memory.limit_in_bytes"),
    ],
)
def test_the_limit_of_a_control_group_holds_for_those_in_it(tmp_path, line, file):
    own = tmp_path / "cgroup"
    own.write_text(f"9:cpu:/\n{line}\n")
    limit = tmp_path / file
    limit.parent.mkdir(parents=True, exist_ok=True)
    limit.write_text("4096\n")
    assert list(group_limits(tmp_path, own)) == [4096]
    limit.write_text("max\n")
    assert list(group_limits(tmp_path, own)) == []


def test_a_machine_without_control_groups_has_all_its_memory(tmp_path):
    assert machine_bytes() <= machine_bytes(tmp_path)
    assert list(group_limits(tmp_path, tmp_path / "none")) == []


SAC, RL2, MAML = ({"algorithm": name} for name in ("sac", "rl2", "maml"))
GRU = {"encoder": "gru", **RL2}
TWO_STEP = {"family": "{type: two_step}"}
LARGE = {
    "network.encoder.hidden_sizes=[65536, 65536]": {},
    "network.encoder.hidden_size=65536": GRU,
    "network.encoder.context=65536": {
        "encoder": "{type: transformer, hidden_size: 512, layers: 8}",
        **RL2,
    },
    "algorithm.num_steps=1000000": {},
    "algorithm.replay_trials=1000000": SAC,
    "algorithm.critic_hidden_sizes=[65536, 65536]": SAC,
    "algorithm.inner_steps=1000000": MAML,
    "rollout.num_envs=1000000": {},
    "rollout.shards=65536": {},
    "tasks.horizon=1000000": GRU,
    "tasks.arms=65536": {
        "family": "{type: bandit}",
        "encoder": "{type: mlp, hidden_sizes: [4096]}",
    },
    "tasks.episodes=1000000": {"family": "{type: grid_nav}", **GRU},
    "tasks.rounds=1000000": TWO_STEP,
    "tasks.pulls=1000000": {"family": "{type: restless_bandit}"},
    "stages.meta.validation_tasks=1000000": TWO_STEP,
    "stages.held_out.tasks=1000000": TWO_STEP,
}


@pytest.mark.parametrize("override", LARGE)
def test_what_the_machine_cannot_hold_is_refused_and_not_made(tmp_path, monkeypatch, override):
    monkeypatch.setattr("dmrl_ray.control.checks.machine_bytes", lambda: 512 << 20)
    file = tmp_path / "run.yaml"
    file.write_text(text(**LARGE[override]))
    setting, before = override.partition("=")[0], peak_bytes()
    start = time.monotonic()
    with pytest.raises(ConfigError) as refused, locate_errors(file, [override]):
        check(parse_config(file.read_text(), str(file), [override]))
    assert time.monotonic() - start < 10
    assert f"{setting}: " in str(refused.value)
    assert "lower it" in str(refused.value)
    assert peak_bytes() - before < 256 << 20


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_documented_needs_little(path):
    held = check_parts(path)
    assert all(sum(part.about_bytes for part in parts) < 1 << 30 for parts in held)


def check_parts(path):
    config = parse_config(path.read_text(), str(path))
    specs = [job_spec(config, name) for name in config.stages]
    own = [spec for spec in specs if not spec.algorithm.type.startswith("rllib:")]
    return [estimate(outline(spec), spec, config.stages[spec.stage]) for spec in own]
