"""The linear layer gives what `nn.Linear` gives, to every derivative, for one weight or many."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from dmrl_ray.networks import linear
from dmrl_ray.networks.linear import MIN_ROWS, MIN_UNITS, Linear

SHAPES = [(MIN_ROWS, 5), (4, MIN_ROWS, 5), (2, 3, MIN_ROWS, 5)]


@pytest.fixture
def calls(monkeypatch):
    """Products that oneDNN was asked for."""
    made, product = [], linear.onednn_linear
    monkeypatch.setattr(
        linear, "onednn_linear", lambda *operands: made.append(operands) or product(*operands)
    )
    return made


def pair(units=32, seed=0):
    torch.manual_seed(seed)
    ours, theirs = Linear(5, units), nn.Linear(5, units)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_a_plain_layer(shape, calls):
    results = []
    for layer in pair():
        torch.manual_seed(1)
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        slopes = torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias])
        results.append([y, *slopes])
    assert len(calls) == 3  # one forward, two backward
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_second_derivatives_are_those_of_a_plain_layer(calls):
    results = []
    for layer in pair():
        x = torch.linspace(-1, 1, 5 * MIN_ROWS).reshape(MIN_ROWS, 5)
        loss = layer(x).pow(3).mean()
        (slope,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), layer.weight)[0])
    assert calls
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_many_weights_at_once_are_those_of_a_plain_layer():
    results = []
    for layer in pair():
        weights = {
            name: torch.stack([p, 2 * p, -p]).detach().requires_grad_()
            for name, p in layer.named_parameters()
        }
        x = torch.linspace(-1, 1, 15 * MIN_ROWS).reshape(3, MIN_ROWS, 5)
        y = vmap(lambda w, x, layer=layer: functional_call(layer, w, (x,)))(weights, x)
        results.append([y, *torch.autograd.grad(y.square().mean(), list(weights.values()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(MIN_ROWS - 1, 5),
        torch.zeros(5),
        torch.zeros(MIN_ROWS, 5, dtype=torch.float64),
    ],
    ids=["few rows", "one row", "double"],
)
def test_what_onednn_does_not_suit_is_left_to_the_plain_layer(x, calls):
    ours, theirs = (layer.to(x.dtype) for layer in pair())
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert not calls


def test_narrow_layers_and_eight_bits_are_left_to_the_plain_layer(calls):
    x = torch.ones(MIN_ROWS, 5)
    narrow, _ = pair(units=MIN_UNITS - 1)
    narrow(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert pair()[0](x).dtype == torch.bfloat16
    assert not calls


def test_weights_are_named_as_those_of_a_plain_layer():
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
