"""The optimisers are PyTorch's, to the last bit, without what it imports for its compiler."""

import subprocess
import sys

import pytest
import torch

from dmrl_ray.learn import optimizers


def trained(kind, **settings):
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = kind([{"params": [parameter], "lr": 0.1}], weight_decay=0.01, **settings)
    for scale in (1.0, -0.5, 2.0):
        parameter.grad = scale * parameter.detach().square()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Adam", {"fused": True}), ("AdamW", {"fused": True}), ("SGD", {})],
    ids=["Adam", "AdamW", "SGD"],
)
def test_steps_are_those_of_pytorch_to_the_last_bit(name, settings):
    own = trained(getattr(optimizers, name), **settings)
    assert torch.equal(own, trained(getattr(torch.optim, name), **settings))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_the_compiler_is_not_imported(name):
    code = f"""
import sys, torch
from dmrl_ray.learn.optimizers import {name}
parameter = torch.nn.Parameter(torch.zeros(3))
optimizer = {name}([parameter], 0.1)
parameter.sum().backward()
optimizer.step()
assert "torch._dynamo" not in sys.modules
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
