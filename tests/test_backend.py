"""What is private in PyTorch may be missing: public operations then give the same result."""

import shutil

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from dmrl_ray import backend
from dmrl_ray.networks.linear import MIN_ROWS, Linear

TRANSFORMS = "_are_functorch_transforms_active"


def without_products(monkeypatch):
    """PyTorch as if it had no `torch.ops.mkldnn._linear_pointwise`."""
    monkeypatch.setattr(torch.ops, "mkldnn", type("mkldnn", (), {}))


def gradients():
    """Of a layer on many rows, and of three layers at once."""
    torch.manual_seed(0)
    layer, x = Linear(5, 32), torch.randn(3, MIN_ROWS, 5)
    weights = {name: torch.stack([p, 2 * p, -p]) for name, p in layer.named_parameters()}
    one = layer(x)
    many = vmap(lambda w, x: functional_call(layer, w, (x,)))(weights, x)
    loss = one.square().mean() + many.square().mean()
    return [one, many, *torch.autograd.grad(loss, list(layer.parameters()))]


@pytest.mark.parametrize("missing", ["product", "transforms", "both"])
def test_a_layer_without_private_operations_has_the_same_gradients(missing, monkeypatch):
    expected = gradients()
    if missing != "transforms":
        without_products(monkeypatch)
    if missing != "product":
        monkeypatch.delattr(torch._C, TRANSFORMS)
    for found, value in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_a_product_without_onednn_is_the_same(monkeypatch):
    x, weight, bias = torch.randn(MIN_ROWS, 5), torch.randn(32, 5), torch.randn(32)
    expected = [backend.onednn_linear(x, weight, b) for b in (bias, None)]
    without_products(monkeypatch)
    for b, value in zip((bias, None), expected, strict=True):
        torch.testing.assert_close(backend.onednn_linear(x, weight, b), value, rtol=1e-5, atol=1e-5)


def test_where_transforms_are_unknown_a_layer_is_the_plain_one(monkeypatch):
    assert not backend.transformed()
    assert vmap(lambda x: x * backend.transformed())(torch.ones(2)).all()
    monkeypatch.delattr(torch._C, TRANSFORMS)
    assert backend.transformed()
    ours = Linear(5, 32)
    x = torch.randn(MIN_ROWS, 5)
    assert not ours._suits(x)
    torch.testing.assert_close(ours(x), nn.functional.linear(x, *ours.parameters()), rtol=0, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="takes a C++ compiler")
def test_code_by_the_public_compiler_is_the_same(monkeypatch):
    def slope(weight, x):
        leaf = weight.detach().requires_grad_()
        loss = torch.tanh(x @ leaf).square().sum()
        return [*torch.autograd.grad(loss, leaf), loss.detach()]

    tensors = [torch.linspace(-1, 1, 6).reshape(3, 2), torch.linspace(0, 1, 12).reshape(4, 3)]
    graph = make_fx(slope)(*tensors)
    private = backend.compile_graph(graph, tensors)
    monkeypatch.delattr("torch._inductor.compile")
    public = backend.compile_graph(graph, tensors)
    other = [2 * tensors[0], tensors[1]]  # not those that it was compiled with
    expected = slope(*other)
    for code in (private, public):
        with torch.no_grad():
            torch.testing.assert_close(code(*other), expected)
