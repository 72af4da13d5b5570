"""A belief is the same step by step and stops the policy's gradient; decoders predict from it."""

import pytest
import torch
from sequences import COLUMNS, STEPS, make, random_memory, sequence, some_resets, step_by_step

from dmrl_ray.networks.belief import Belief
from dmrl_ray.networks.decoder import HeadDecoder, StepDecoder, TrialDecoder

HISTORY = {"type": "gru", "hidden_size": 8}


def belief(**settings):
    return make(Belief, history=HISTORY, latent=2, hidden_sizes=[16], **settings)


@pytest.mark.parametrize("history", ["gru", "lstm"])
def test_a_whole_sequence_in_one_call_equals_step_by_step(history):
    encoder = make(Belief, history={"type": history, "hidden_size": 8})
    obs, memory, reset = sequence(), random_memory(encoder), some_resets()
    features, after = encoder(obs, None, memory, reset)
    expected, expected_after = step_by_step(encoder, obs, memory, reset)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(after, expected_after)


def test_features_are_a_function_of_the_observation_and_the_posterior():
    encoder, obs = belief(), sequence()
    mean, log_var, _ = encoder.posterior(obs, None, encoder.initial_memory(COLUMNS), None)
    features, _ = encoder(obs, None, encoder.initial_memory(COLUMNS), None)
    torch.testing.assert_close(features, encoder.features(obs, mean, log_var))
    assert not torch.allclose(features, encoder.features(obs, mean + 1, log_var))


def test_the_first_belief_depends_on_nothing_to_come():
    encoder, obs = belief(), sequence()
    other = obs.clone()
    other[1:] += 1
    beliefs = [
        encoder.posterior(o, None, encoder.initial_memory(COLUMNS), None) for o in (obs, other)
    ]
    torch.testing.assert_close(beliefs[0][0][0], beliefs[1][0][0])
    assert not torch.allclose(beliefs[0][0][1:], beliefs[1][0][1:])


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_of_features_reaches_the_belief_only_if_not_detached(detach):
    encoder = belief(detach=detach)
    encoder(sequence(), None, encoder.initial_memory(COLUMNS), None)[0].sum().backward()
    moved = {name.split(".")[0] for name, p in encoder.named_parameters() if p.grad is not None}
    assert moved == ({"layers"} if detach else {"layers", "history", "gaussian"})


def test_a_belief_needs_a_history():
    with pytest.raises(ValueError, match=r"network\.encoder\.history: mlp has no memory"):
        make(Belief, history="mlp")


def latents(num):
    return torch.randn(num, COLUMNS, 2, generator=torch.Generator().manual_seed(2))


def test_every_belief_predicts_every_step_of_its_own_trial():
    decoder, latent, step = StepDecoder(2, 3, 1, (8, 4)), latents(5), sequence()
    predictions = decoder(latent, step)
    assert predictions.shape == (5, STEPS, COLUMNS, 1)
    alone = decoder(latent[3:4, 2:3], step[6:7, 2:3])
    torch.testing.assert_close(predictions[3, 6, 2], alone[0, 0, 0])


def test_the_halves_of_the_first_layer_are_one_layer_of_both():
    decoder, latent, step = StepDecoder(2, 3, 1, (8, 4)), latents(1), sequence()[:1]
    with torch.no_grad():
        decoder.of_step.bias += 0.5
    weight = torch.cat([decoder.of_latent.weight, decoder.of_step.weight], 1)
    hidden = torch.cat([latent, step], -1) @ weight.T + 0.5
    torch.testing.assert_close(decoder(latent, step)[0], decoder.layers(hidden))


def test_a_head_predicts_for_its_own_entry():
    # Steps on entry 0, 1, 2, 0, 1, 2, 0: predictions repeat, and are the heads' outputs.
    decoder, latent = HeadDecoder(2, 3, (8,)), latents(4)
    step = torch.eye(3)[torch.arange(STEPS) % 3].unsqueeze(1).expand(-1, COLUMNS, -1)
    predictions, heads = decoder(latent, step).squeeze(-1), decoder.layers(latent)
    for t in range(STEPS):
        torch.testing.assert_close(predictions[:, t], heads[..., t % 3])


def test_a_trial_decoder_has_a_loss_of_each_kind_of_prediction():
    config = TrialDecoder.Config(decode_obs=True)
    decoder = TrialDecoder(config, 2, 3, 2)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    obs, action = torch.zeros(STEPS, COLUMNS, 3), torch.zeros(STEPS, COLUMNS, 2)
    next_obs, reward = torch.ones(STEPS, COLUMNS, 3), torch.full((STEPS, COLUMNS), 2.0)
    losses = decoder(latents(5), obs, action, next_obs, reward)
    # It predicts 0 everywhere: 7 steps of 2 squared, and of 3 ones.
    assert losses["reward_loss"].item() == pytest.approx(28)
    assert losses["obs_loss"].item() == pytest.approx(21)


@pytest.mark.parametrize("heads", ["action", "next_obs"])
def test_heads_are_chosen_by_what_the_setting_names(heads):
    decoder = TrialDecoder(TrialDecoder.Config(heads=heads), 2, 3, 2)
    g = torch.Generator().manual_seed(0)
    given = {
        name: torch.rand(STEPS, COLUMNS, width, generator=g)
        for name, width in (("obs", 3), ("action", 2), ("next_obs", 3))
    }
    reward = torch.zeros(STEPS, COLUMNS)
    before = decoder(latents(1), **given, reward=reward)["reward_loss"]
    for name, part in given.items():
        after = decoder(latents(1), **(given | {name: part + 1}), reward=reward)["reward_loss"]
        assert torch.equal(before, after) == (name != heads)
