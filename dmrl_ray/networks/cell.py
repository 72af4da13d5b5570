"""Recurrent cells in plain tensor operations.

The fused kernels of `nn.LSTM`, `nn.GRU` and `nn.RNN` are fast, but `torch.func.vmap` and second
derivatives cannot take them. These functions compute the same from the same weights, a step at a
time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dmrl_ray.networks.base import Memory, reset_memory


def step_by_step(
    cell: nn.RNNBase, x: Tensor, memory: Memory, reset: Tensor | None
) -> tuple[Tensor, Memory]:
    """The outputs of one layer of `nn.LSTM`, `nn.GRU` or `nn.RNN`.

    Args:
        cell: whose weights are used.
        x: (T, B, D).
        memory: leaves (B, H): hidden and cell of an LSTM, hidden of the others.
        reset: (T, B) bool, zeroes the memory before a step; None means nowhere.

    Returns:
        Outputs (T, B, H) and the memory after the last step.
    """
    step = _STEPS[cell.mode]
    weights = dict(cell.named_parameters())
    from_input = linear(x, weights["weight_ih_l0"], weights["bias_ih_l0"])
    out = []
    for t in range(x.shape[0]):
        if reset is not None:
            memory = reset_memory(memory, reset[t])
        from_memory = linear(memory[0], weights["weight_hh_l0"], weights["bias_hh_l0"])
        memory = step(from_input[t], from_memory, memory)
        out.append(memory[0])
    return torch.stack(out), memory


def _lstm(from_input: Tensor, from_memory: Tensor, memory: Memory) -> Memory:
    write, keep, new, read = (from_input + from_memory).chunk(4, -1)
    cell = keep.sigmoid() * memory[1] + write.sigmoid() * new.tanh()
    return read.sigmoid() * cell.tanh(), cell


def _gru(from_input: Tensor, from_memory: Tensor, memory: Memory) -> Memory:
    reset_x, keep_x, new_x = from_input.chunk(3, -1)
    reset_h, keep_h, new_h = from_memory.chunk(3, -1)
    keep = (keep_x + keep_h).sigmoid()
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (new + keep * (memory[0] - new),)


def _tanh(from_input: Tensor, from_memory: Tensor, memory: Memory) -> Memory:
    return ((from_input + from_memory).tanh(),)


def _relu(from_input: Tensor, from_memory: Tensor, memory: Memory) -> Memory:
    return ((from_input + from_memory).relu(),)


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}
