"""Norms, dropout and adapters: what stands between the layers, and when it acts."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from sequences import COLUMNS, STEPS, make, sequence
from torch.func import functional_call, vmap

from dmrl_ray.networks.cnn import CNN, Residual
from dmrl_ray.networks.mlp import MLP

EVERYTHING = {"layer_norm": True, "batch_norm": True, "dropout": 0.5, "adapters": 3}
SHAPES = {MLP: (3,), CNN: (6, 6, 2), Residual: (6, 6, 2)}
SIZES = {MLP: {"hidden_sizes": (8, 8)}, CNN: {"channels": (4,)}, Residual: {"channels": (4,)}}


def encoder_of(kind, **settings):
    return make(kind, SHAPES[kind], **SIZES[kind], **settings)


def inputs(kind):
    return torch.rand(STEPS, COLUMNS, *SHAPES[kind], generator=torch.Generator().manual_seed(0))


def test_layer_normalised_units_have_mean_0_and_deviation_1_at_every_step():
    encoder = make(MLP, hidden_sizes=(50,), layer_norm=True)
    x = encoder.layers[1](encoder.layers[0](100 * sequence()))
    torch.testing.assert_close(x.mean(-1), torch.zeros(STEPS, COLUMNS), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        x.var(-1, correction=0), torch.ones(STEPS, COLUMNS), atol=1e-3, rtol=0
    )


def test_batch_normalised_units_have_mean_0_over_steps_and_columns():
    encoder = make(MLP, hidden_sizes=(5,), batch_norm=True).train()
    x = encoder.layers[1](encoder.layers[0](sequence() + 7))
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [MLP, CNN, Residual])
def test_acting_is_one_function_of_one_step(kind):
    encoder = encoder_of(kind, **EVERYTHING)
    obs = inputs(kind)
    encoder.train()(obs, None, (), None)  # gives it statistics
    encoder.eval()
    state = {name: x.clone() for name, x in encoder.state_dict().items()}
    whole, _ = encoder(obs, None, (), None)
    alone, _ = encoder(obs[2:3, 1:2], None, (), None)
    torch.testing.assert_close(alone, whole[2:3, 1:2])
    for name, x in encoder.state_dict().items():
        assert torch.equal(x, state[name]), name


@pytest.mark.parametrize("kind", [MLP, CNN, Residual])
def test_many_tasks_with_parameters_of_their_own_act_at_once(kind):
    encoder = encoder_of(kind, **EVERYTHING).eval()
    obs = inputs(kind)
    params = {n: torch.stack([p, p * 0.9]) for n, p in encoder.named_parameters()}
    both = vmap(lambda p: functional_call(encoder, p, (obs, None, (), None))[0])(params)
    for i in range(2):
        mine = {n: p[i] for n, p in params.items()}
        expected, _ = functional_call(encoder, mine, (obs, None, (), None))
        torch.testing.assert_close(both[i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [MLP, CNN])
def test_statistics_of_a_frozen_encoder_stand_still(kind):
    encoder = encoder_of(kind, batch_norm=True).requires_grad_(False).train()
    state = {name: x.clone() for name, x in encoder.state_dict().items()}
    encoder(inputs(kind), None, (), None)
    for name, x in encoder.state_dict().items():
        assert torch.equal(x, state[name]), name


@pytest.mark.parametrize("kind", [MLP, CNN])
def test_a_batch_that_is_not_finite_leaves_the_statistics_finite(kind):
    encoder = encoder_of(kind, batch_norm=True).train()
    for bad in (np.nan, np.inf):
        encoder(torch.full_like(inputs(kind), bad), None, (), None)
    assert all(torch.isfinite(x).all() for x in encoder.state_dict().values())
    state = {name: x.clone() for name, x in encoder.state_dict().items()}
    encoder(inputs(kind), None, (), None)[0].sum().backward()  # and are nothing that it reads
    assert any(not torch.equal(x, state[n]) for n, x in encoder.state_dict().items() if "run" in n)


def test_dropout_leaves_its_share_of_units_out_of_a_gradient_step_alone():
    encoder = make(MLP, hidden_sizes=(1000,), dropout=0.3, activation="sigmoid")
    dropped = encoder.train()(sequence(), None, (), None)[0] == 0
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (encoder.eval()(sequence(), None, (), None)[0] != 0).all()


@pytest.mark.parametrize("kind", [MLP, CNN])
def test_adapters_change_nothing_until_they_are_trained(kind):
    plain, adapted = encoder_of(kind), encoder_of(kind, adapters=3)
    missing = adapted.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all("adapter" in name for name in missing)
    obs = inputs(kind)
    torch.testing.assert_close(adapted(obs, None, (), None), plain(obs, None, (), None))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("adapter" in name)
    adapted(obs, None, (), None)[0].sum().backward()
    assert any((p.grad != 0).any() for p in adapted.parameters() if p.grad is not None)


@pytest.mark.parametrize("setting", ["layer_norm", "batch_norm"])
def test_weights_have_their_names_whatever_stands_between(setting):
    space = Box(-np.inf, np.inf, (3,), np.float32)
    plain, more = (MLP(MLP.Config.model_validate(s), space, 0) for s in ({}, {setting: True}))
    assert set(plain.state_dict()) < set(more.state_dict())
