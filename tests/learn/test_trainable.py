"""Which parameters move: all, heads, the last layers, adapters, or what a pattern says."""

import pytest
import torch

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.learn.trainable import select

MLP = {"type": "mlp", "hidden_sizes": [8, 8]}
NORMED = MLP | {"layer_norm": True, "adapters": 2}
GRU = {"type": "gru", "hidden_size": 8, "torso": MLP}
HEADS = {
    f"{head}.{kind}" for head in ("policy_head.layer", "value_head") for kind in ("weight", "bias")
}


def make_learner(encoder=MLP, trainable=("",), **network):
    parts = (
        {"type": "cartpole"},
        {"type": "actor_critic", "encoder": encoder} | network,
        {"type": "ppo", "num_steps": 16},
    )
    parts = (Component.model_validate(part) for part in parts)
    rollout = RolloutSettings(shards=1, num_envs=4)
    return Learner(JobSpec("s", "s", 0, *parts, rollout, trainable=trainable))


def names(learner):
    return [name for name, _ in learner.policy.named_parameters()]


def updated(learner):
    """The names of what an update moves."""
    before = learner.weights()
    weights = Weights(0, before)
    _, trial, _ = RolloutWorker().collect(CollectCall(learner.spec, 0, 0, 0), weights, {})
    learner.update(0, 0, [trial])
    after = learner.weights()
    return {name for name in before if (before[name] != after[name]).any()}


def layer(*indices):
    """Names of dense layers in both encoders."""
    found = {f"layers.{i}.{kind}" for i in indices for kind in ("weight", "bias")}
    return {f"{encoder}.{name}" for encoder in ("encoder", "value_encoder") for name in found}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("last:1", HEADS),
        ("last:2", HEADS | layer(2)),
        ("last:3", HEADS | layer(0, 2)),
        ("last:9", HEADS | layer(0, 2)),
    ],
)
def test_the_last_layers_are_counted_from_the_heads(part, expected):
    assert select("trainable", [part], names(make_learner())) == expected


def test_norms_and_adapters_belong_to_the_layer_before_them():
    chosen = select("trainable", ["last:2"], names(make_learner(NORMED, separate_value=False)))
    inside = {name.split(".")[2] for name in chosen - HEADS}
    assert inside == {"2", "layer_norm1", "adapter1"}


def test_a_recurrent_layer_is_one_layer():
    chosen = select("trainable", ["last:2"], names(make_learner(GRU)))
    assert {name.split(".")[1] for name in chosen - HEADS} == {"cell"}


@pytest.mark.parametrize("part", ["*adaptor*", "haed", "last:0"])
def test_what_chooses_nothing_is_refused_with_what_there_is(part):
    with pytest.raises(ValueError, match=r"trainable: no parameter's name .*policy_head"):
        make_learner(trainable=(part,))


@pytest.mark.parametrize("trainable", [("",), ("policy_head", "value_head"), ("last:2",)])
def test_what_is_chosen_moves_and_nothing_else(trainable):
    learner = make_learner(trainable=trainable)
    moved = updated(learner) & set(names(learner))
    assert moved == select("trainable", trainable, names(learner))


@pytest.mark.parametrize(
    ("plain", "encoder"),
    [(MLP, MLP | {"adapters": 2}), (GRU, GRU | {"torso": MLP | {"adapters": 2}})],
    ids=["mlp", "gru"],
)
def test_adapters_learn_in_a_pretrained_network_that_stands_still(plain, encoder):
    pretrained = make_learner(plain)
    tuned = make_learner(encoder, trainable=("*adapter*",))
    tuned.load_weights(pretrained.weights())
    obs = torch.randn(3, 4, 4)
    memory = tuned.policy.initial_memory(4)
    for one, two in zip(
        pretrained.policy(obs, None, memory)[:2], tuned.policy(obs, None, memory)[:2], strict=True
    ):
        torch.testing.assert_close(one, two)
    moved = updated(tuned)
    assert {name for name in moved if name in names(tuned)}
    assert all("adapter" in name or name.startswith("value_norm") for name in moved)


def test_statistics_of_frozen_layers_stand_still():
    encoder = MLP | {"batch_norm": True, "adapters": 2}
    moved = updated(make_learner(encoder, trainable=("*adapter*",)))
    assert not any("running" in name or "obs_norm" in name for name in moved)
