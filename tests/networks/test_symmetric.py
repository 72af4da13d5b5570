"""No action is special: what is known of actions moves with them."""

import pytest
import torch
from sequences import COLUMNS, STEPS, make, random_memory, sequence, some_resets, step_by_step

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.networks.symmetric import Symmetric

ACTIONS = 5


def play(seed=0):
    """Previous actions one-hot (none at first), rewards and ends of episodes."""
    g = torch.Generator().manual_seed(seed)
    action = torch.randint(ACTIONS, (STEPS, COLUMNS), generator=g)
    extra = torch.zeros(STEPS, COLUMNS, ACTIONS + 2)
    extra[1:, :, :ACTIONS] = torch.nn.functional.one_hot(action, ACTIONS)[1:].float()
    extra[..., -2:] = torch.randn(STEPS, COLUMNS, 2, generator=g)
    return extra


def symmetric(updates="all"):
    settings = {
        "hidden_size": 6,
        "width": 4,
        "activation": "tanh",
        "ordered": False,
        "updates": updates,
    }
    encoder = make(Symmetric, extra=ACTIONS + 2, **settings)
    return encoder, encoder.action_layer(ACTIONS)


@pytest.mark.parametrize("updates", ["all", "taken"])
def test_permuted_actions_have_permuted_logits(updates):
    encoder, layer = symmetric(updates)
    order = torch.tensor([3, 0, 4, 1, 2])
    extra, (memory,) = play(), random_memory(encoder)
    memory_moved = memory.unflatten(1, (ACTIONS, -1))[:, order].flatten(1)
    permuted = torch.cat([extra[..., order], extra[..., -2:]], -1)
    features, (after,) = encoder(sequence(), extra, (memory,), some_resets())
    moved, (after_moved,) = encoder(sequence(), permuted, (memory_moved,), some_resets())
    torch.testing.assert_close(layer(moved), layer(features)[..., order])
    torch.testing.assert_close(after_moved, after.unflatten(1, (ACTIONS, -1))[:, order].flatten(1))
    assert not torch.allclose(layer(moved), layer(features))


@pytest.mark.parametrize("updates", ["all", "taken"])
def test_actions_that_were_never_taken_have_one_logit(updates):
    encoder, layer = symmetric(updates)
    extra = play()
    extra[..., 1:4] = 0  # as if 1, 2 and 3 had never been taken
    logits = layer(encoder(sequence(), extra, encoder.initial_memory(COLUMNS), None)[0])
    torch.testing.assert_close(logits[..., 1], logits[..., 2])
    torch.testing.assert_close(logits[..., 1], logits[..., 3])
    assert not torch.allclose(logits[..., 1], logits[..., 4])


@pytest.mark.parametrize("updates", ["all", "taken"])
def test_an_action_is_judged_in_the_light_of_the_others(updates):
    encoder, layer = symmetric(updates)
    memory = encoder.initial_memory(COLUMNS)
    extra = play()
    extra[..., :ACTIONS] = 0
    other = extra.clone()
    other[2, :, 4] = 1.0
    one, two = (layer(encoder(sequence(), x, memory, None)[0]) for x in (extra, other))
    assert torch.equal(one[:2], two[:2])
    assert (one[2:, :, 0] != two[2:, :, 0]).all()


@pytest.mark.parametrize("updates", ["all", "taken"])
@pytest.mark.parametrize("reset", [None, "some"])
def test_a_whole_sequence_in_one_call_equals_step_by_step(reset, updates):
    encoder, _ = symmetric(updates)
    memory, extra = random_memory(encoder), play()
    reset = None if reset is None else some_resets()
    whole = encoder(sequence(), extra, memory, reset)
    torch.testing.assert_close(whole, step_by_step(encoder, sequence(), memory, reset, extra))


def test_the_cells_of_taken_actions_alone_can_be_the_ones_that_move():
    encoder, _ = symmetric("taken")
    (before,), extra = random_memory(encoder), play()
    _, (after,) = encoder(sequence()[1:2], extra[1:2], (before,), None)
    moved = (after != before).reshape(COLUMNS, ACTIONS, -1)
    assert torch.equal(moved.all(-1), extra[1, :, :ACTIONS].bool())
    assert torch.equal(moved.any(-1), moved.all(-1))
    _, (none,) = encoder(sequence()[:1], extra[:1], (before,), None)
    assert torch.equal(none, before)  # nothing was taken before the first step


def test_a_cell_moves_the_same_whether_the_others_do_or_not():
    both = [symmetric(updates)[0] for updates in ("all", "taken")]
    both[1].cell.load_state_dict(both[0].cell.state_dict())
    memory, extra = random_memory(both[0]), play()[1:2]
    afters = [encoder(sequence()[1:2], extra, memory, None)[1][0] for encoder in both]
    every, taken = (after.reshape(COLUMNS, ACTIONS, -1) for after in afters)
    mine = extra[0, :, :ACTIONS].bool()
    torch.testing.assert_close(taken[mine], every[mine])


def test_it_counts_actions_and_says_what_it_does_not_support():
    with pytest.raises(ValueError, match=r"sees its previous action.*rl2"):
        make(Symmetric, extra=0)
    with pytest.raises(ValueError, match=r"counted 8 actions.*there are 5.*network\.context"):
        make(Symmetric, extra=ACTIONS + 3 + 2).action_layer(ACTIONS)


@pytest.mark.parametrize("updates", ["all", "taken"])
def test_a_learner_sees_the_policy_that_acted(updates):
    # Ratio one on the first minibatch, in trials of which none begins at the first step.
    parts = (
        {"type": "cartpole"},
        {"type": "actor_critic", "encoder": {"type": "symmetric", "updates": updates}},
        {"type": "rl2", "epochs": 1, "minibatches": 1},
    )
    parts = [Component.model_validate(part) for part in parts]
    spec = JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=4))
    learner = Learner(spec)
    weights = Weights(0, learner.weights())
    _, trial, _ = RolloutWorker().collect(CollectCall(spec, 0, 0, 0), weights, {})
    metrics = learner.update(0, 0, [trial])
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["grad_norm"] > 1e-3


def test_the_first_of_equal_actions_can_be_told_from_the_rest():
    encoder = make(Symmetric, extra=ACTIONS + 2, hidden_size=6, width=4)
    nothing = torch.zeros(1, 1, ACTIONS + 2)
    features, _ = encoder(torch.zeros(1, 1, 3), nothing, encoder.initial_memory(1), None)
    layer = encoder.action_layer(ACTIONS)
    torch.nn.init.ones_(layer.layer.weight)
    logits = layer(features)[0, 0]
    assert logits[0] != logits[1]
    assert torch.equal(logits[1:], logits[1].expand(ACTIONS - 1))
