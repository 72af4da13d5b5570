"""A transformer acts step by step as it learns from whole sequences."""

import pytest
import torch
from sequences import COLUMNS, STEPS, make, sequence, some_resets, step_by_step

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.networks.transformer import Transformer


def transformer(context=STEPS, **settings):
    """Not as it begins, when attention adds nothing."""
    encoder = make(Transformer, hidden_size=16, heads=2, context=context, **settings)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return encoder


def lived(encoder, steps):
    """The memory of columns that have lived through some steps, each another number."""
    memory = encoder.initial_memory(COLUMNS)
    reset = torch.zeros(steps, COLUMNS, dtype=torch.bool)
    reset[1, 0] = True
    return encoder(sequence(5, steps=steps), None, memory, reset)[1]


def acted(encoder, obs, memory, reset):
    """All columns side by side, without gradients, as a worker acts."""
    outputs = []
    with torch.no_grad():
        for t in range(len(obs)):
            now = None if reset is None or not reset[t].any() else reset[t : t + 1]
            out, memory = encoder(obs[t : t + 1], None, memory, now)
            outputs.append(out)
    return torch.cat(outputs), memory


@pytest.mark.parametrize("context", [3, STEPS, 12])
@pytest.mark.parametrize("before", [0, 2, 5])
@pytest.mark.parametrize("reset", [None, "some"])
def test_a_whole_sequence_in_one_call_equals_acting_step_by_step(context, before, reset):
    encoder = transformer(context)
    memory = lived(encoder, before) if before else encoder.initial_memory(COLUMNS)
    reset = None if reset is None else some_resets()
    whole, after = encoder(sequence(), None, memory, reset)
    features, end = acted(encoder, sequence(), memory, reset)
    torch.testing.assert_close(features, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(end[1], after[1])
    # What is not compared is what the rings hold of steps long past; what they mean is.
    on, also = (encoder(sequence(2), None, m, None)[0] for m in (end, after))
    torch.testing.assert_close(on, also, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", range(1, STEPS))
def test_a_sequence_can_be_cut_anywhere(cut):
    encoder, reset = transformer(4), some_resets()
    whole, _ = encoder(sequence(), None, lived(encoder, 3), reset)
    first, between = encoder(sequence()[:cut], None, lived(encoder, 3), reset[:cut])
    second, _ = encoder(sequence()[cut:], None, between, reset[cut:])
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-5, rtol=1e-5)


def test_a_reset_begins_anew():
    encoder, reset = transformer(), some_resets()
    features, _ = encoder(sequence(), None, lived(encoder, 3), reset)
    expected, _ = step_by_step(encoder, sequence(), lived(encoder, 3), reset)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_only_steps_within_the_context_and_before_are_seen():
    # Attention to the last 3 steps in each of 2 layers reaches 4 steps back.
    encoder, obs = transformer(3), sequence().requires_grad_()
    features, _ = encoder(obs, None, encoder.initial_memory(COLUMNS), None)
    features[5, 0].sum().backward()
    seen = (obs.grad[:, 0] != 0).any(-1)
    assert seen.tolist() == [False, True, True, True, True, True, False]
    assert (obs.grad[:, 1:] == 0).all()


def test_it_matters_how_long_ago_a_step_was():
    encoder, memory = transformer(layers=1), None
    obs = sequence()
    memory = encoder.initial_memory(COLUMNS)
    swapped = obs[[1, 0, *range(2, STEPS)]]
    one, two = (encoder(x, None, memory, None)[0] for x in (obs, swapped))
    assert not torch.allclose(one[-1], two[-1], atol=1e-3)


def test_it_begins_as_a_policy_without_memory():
    encoder = make(Transformer, hidden_size=16, heads=2)
    memory = encoder.initial_memory(COLUMNS)
    one, two = (
        encoder(torch.cat([sequence(s), sequence(9)]), None, memory, None)[0] for s in (0, 1)
    )
    assert torch.equal(one[STEPS:], two[STEPS:])


def test_acting_leaves_the_memory_it_started_from_good():
    # The worker keeps it for the learner while it goes on, through resets and around the ring.
    encoder = transformer(4)
    memory = lived(encoder, 2)
    before, _ = encoder(sequence(), None, memory, None)
    acted(encoder, sequence(3), memory, some_resets())
    after, _ = encoder(sequence(), None, memory, None)
    torch.testing.assert_close(after, before)


def test_heads_must_share_the_width():
    with pytest.raises(ValueError, match=r"size 16 cannot be split into 3 heads.*multiple of 6"):
        Transformer.Config(hidden_size=16, heads=3)


@pytest.mark.parametrize("algorithm", ["ppo", "rl2"])
def test_a_learner_sees_the_policy_that_acted(algorithm):
    encoder = {"type": "transformer", "hidden_size": 16, "context": 12, "heads": 2}
    settings = {"num_steps": 30} if algorithm == "ppo" else {}
    parts = (
        {"type": "cartpole"},
        {"type": "actor_critic", "encoder": encoder},
        {"type": algorithm, "epochs": 1, "minibatches": 1, **settings},
    )
    parts = [Component.model_validate(part) for part in parts]
    spec = JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=4))
    learner, worker, state = Learner(spec), RolloutWorker(), {}
    with torch.no_grad():  # an almost uniform policy would hide what its memory holds
        for block in learner.policy.encoder.blocks:
            block.attended.weight += 0.3 * torch.randn(16, 16)
        learner.policy.policy_head.layer.weight *= 50
    for i in range(2):
        weights = Weights(0, learner.weights())
        _, trial, state = worker.collect(CollectCall(spec, 0, i, 0), weights, state)
    metrics = learner.update(0, 0, [trial])
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["grad_norm"] > 1e-3


def test_steps_before_the_last_reset_are_not_kept():
    encoder, reset = transformer(12), torch.zeros(STEPS, COLUMNS, dtype=torch.bool)
    reset[4] = True
    _, (ring, position) = encoder(sequence(), None, encoder.initial_memory(COLUMNS), reset)
    kept = (ring.reshape(COLUMNS, *encoder.ring) != 0).flatten(4).any(-1)
    assert kept[:, :, :, :3].all()
    assert not kept[:, :, :, 3:].any()
    assert position.flatten().tolist() == [3] * COLUMNS
