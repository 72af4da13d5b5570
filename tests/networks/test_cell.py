"""Plain recurrent cells compute what the fused kernels do, and what those cannot."""

import pytest
import torch
from gymnasium.spaces import Box
from torch import nn
from torch.func import functional_call, vmap

from dmrl_ray.networks.cell import step_by_step
from dmrl_ray.networks.recurrent import GRU, LSTM, over_segments

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
STEPS, COLUMNS, WIDTH, SIZE = 5, 3, 4, 6


def make_cell(kind):
    torch.manual_seed(0)
    leaves = 2 if kind is nn.LSTM else 1
    return kind(WIDTH, SIZE), tuple(torch.randn(COLUMNS, SIZE) for _ in range(leaves))


def fused(cell, x, memory):
    state = tuple(leaf.unsqueeze(0) for leaf in memory)
    out, after = cell(x, state if len(state) > 1 else state[0])
    after = after if isinstance(after, tuple) else (after,)
    return out, tuple(leaf.squeeze(0) for leaf in after)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_fused_kernel_does(kind, resets):
    cell, memory = make_cell(kind)
    x = torch.randn(STEPS, COLUMNS, WIDTH)
    reset = torch.rand(STEPS, COLUMNS) < 0.4 if resets else None
    expected, end = over_segments(lambda x, m: fused(cell, x, m), x, memory, reset)
    found, after = step_by_step(cell, x, memory, reset)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for a, b in zip(after, end, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_fused_kernels_too(kind):
    cell, memory = make_cell(kind)
    x = torch.randn(STEPS, COLUMNS, WIDTH)
    gradients = []
    for run in (fused, lambda *inputs: step_by_step(*inputs, None)):
        loss = run(cell, x, memory)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(cell.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_equal_finite_differences(kind):
    cell, memory = make_cell(kind)
    cell.double()
    x = torch.randn(2, COLUMNS, WIDTH, dtype=torch.float64)
    memory = tuple(leaf.double() for leaf in memory)
    weights = dict(cell.named_parameters())

    def out(weight):
        swapped = weights | {"weight_hh_l0": weight}
        named = {f"cell.{name}": p for name, p in swapped.items()}
        return functional_call(Steps(cell), named, (x, memory))

    assert torch.autograd.gradgradcheck(out, (weights["weight_hh_l0"],), atol=1e-6)


class Steps(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, memory):
        return step_by_step(self.cell, x, memory, None)[0]


@pytest.mark.parametrize("encoder", [LSTM, GRU])
def test_under_vmap_every_task_has_weights_of_its_own(encoder):
    torch.manual_seed(0)
    module = encoder(encoder.Config(hidden_size=SIZE), Box(-1.0, 1.0, (WIDTH,)), 0)
    many = {name: torch.stack([p, -p, 2 * p]).detach() for name, p in module.named_parameters()}
    obs, memory = torch.randn(STEPS, COLUMNS, WIDTH), module.initial_memory(COLUMNS)
    apart = []
    for i in range(3):
        weights = {name: p[i] for name, p in many.items()}
        apart.append(functional_call(module, weights, (obs, None, memory, None))[0])
    module.use_plain_operations()
    together = vmap(lambda p: functional_call(module, p, (obs, None, memory, None))[0])(many)
    torch.testing.assert_close(together, torch.stack(apart), rtol=0, atol=1e-6)
