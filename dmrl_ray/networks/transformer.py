"""A causal transformer over the steps of a trial, with a cache of keys and values when acting.

Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762), with layers that
normalise what they read and begin as the identity, so that a policy begins by what it sees, as in
Parisotto et al., "Stabilizing Transformers for Reinforcement Learning", 2020 (arXiv:1910.06764,
section 3.2). Positions are relative, by rotation (Su et al. 2021, arXiv:2104.09864, eq. 15). Left
out: gates, and the paper's memory of hidden states, of which keys and values take the place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from gymnasium.spaces import Box
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dmrl_ray.config.components import Size
from dmrl_ray.networks.base import Memory, TorsoEncoder, linear, reset_memory


class Transformer(TorsoEncoder):
    """Every step attends to itself and to the `context` - 1 steps before it since the last reset.

    Memory is a ring of keys and values (B, layers * 2 * context * size), of width 0 until the first
    step, and the number of steps since the reset (B, 1). Acting writes into the ring in place: of
    two continuations of one memory the last alone is good. No gradient runs through memory.
    """

    class Config(TorsoEncoder.Config):
        hidden_size: Size = 64
        """Width of the features."""

        layers: Size = 2
        """Attention layers."""

        heads: Size = 4
        """Attention heads of each layer."""

        context: Size = 128
        """Steps that can be attended to; a whole trial for RL^2."""

        @model_validator(mode="after")
        def _heads_are_even(self) -> Transformer.Config:
            if self.hidden_size % (2 * self.heads):
                raise ValueError(
                    f"hidden_size {self.hidden_size} cannot be split into {self.heads} heads of "
                    f"an even width; use a multiple of {2 * self.heads}"
                )
            return self

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__(config, obs_space, extra)
        self.context = config.context
        self.ring = (
            config.layers,
            2,
            config.context,
            config.heads,
            config.hidden_size // config.heads,
        )
        self.embedding = linear(self.in_dim, config.hidden_size, gain=1.0)
        blocks = (Block(config.hidden_size, config.heads) for _ in range(config.layers))
        self.blocks: Iterable[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.LayerNorm(config.hidden_size)
        self.out_dim = config.hidden_size

    def initial_memory(self, num: int) -> Memory:
        return torch.zeros(num, 0), torch.zeros(num, 1, dtype=torch.int64)

    @property
    def memory_bytes(self) -> int:
        return 4 * math.prod(self.ring)

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        x = self.embedding(self.read(obs, extra)).transpose(0, 1)  # (B, T, D)
        ring, before = memory[0].reshape(len(x), -1, *self.ring[1:]), memory[1]
        if x.shape[1] == 1 and not torch.is_grad_enabled():
            x, memory = self._step(x, ring, before, reset)
        else:
            x, memory = self._sequence(x, ring, before, reset)
        return self.norm(x).transpose(0, 1), memory

    def _step(
        self, x: Tensor, ring: Tensor, before: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """One step, written into the ring."""
        if reset is not None:
            (before,) = reset_memory((before,), reset[0])
        longest = int(before.max())
        if ring.shape[1] == 0:
            ring = x.new_zeros(len(x), *self.ring)
        elif reset is not None or longest >= self.context:
            ring = ring.clone()  # What it would write over may still be needed.
        rows, slot = torch.arange(len(x), device=x.device), before[:, 0] % self.context
        filled = min(longest + 1, self.context)
        mask = (torch.arange(filled, device=x.device) <= before)[:, None, None]
        for layer, block in enumerate(self.blocks):
            query, key, value = block.project(x, before)
            ring[rows, layer, 0, slot], ring[rows, layer, 1, slot] = key[:, 0], value[:, 0]
            keys, values = ring[:, layer, :, :filled].unbind(1)
            x = block.attend(x, query, keys, values, mask)
        return x, (ring.flatten(1), before + 1)

    def _sequence(
        self, x: Tensor, ring: Tensor, before: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """Many steps at once, behind those in the ring."""
        t = torch.arange(x.shape[1], device=x.device)
        start = torch.full_like(t, -1).expand(len(x), -1)  # step of the last reset, or -1
        if reset is not None:
            start = torch.where(reset.T, t, start).cummax(1).values
        position = torch.where(start < 0, before + t, t - start)
        mask = self._mask(t, start, before, position, ring)
        pairs = []
        for layer, block in enumerate(self.blocks):
            query, key, value = block.project(x, position)
            pairs.append(torch.stack([key, value], 1))
            keys, values = pairs[-1].unbind(1)
            if ring.shape[1]:
                past = ring[:, layer]
                keys, values = torch.cat([past, pairs[-1]], 2).unbind(1)
            x = block.attend(x, query, keys, values, mask)
        with torch.no_grad():
            return x, self._remember(torch.stack(pairs, 1), ring, start, position)

    def _mask(
        self, t: Tensor, start: Tensor, before: Tensor, position: Tensor, ring: Tensor
    ) -> Tensor | None:
        """(B, 1, T, ring + T) bool, what each step may attend to; None is all steps before it."""
        if ring.shape[1] == 0 and len(t) <= self.context and bool((start <= 0).all()):
            return None
        age = t[:, None] - t
        recent = (age >= 0) & (age < self.context)
        mask = recent & (start[:, :, None] == start[:, None, :])
        if ring.shape[1]:
            # Slot j holds the last step whose number is j modulo the size of the ring.
            slot = torch.arange(self.context, device=t.device)
            held = before - 1 - (before - 1 - slot) % self.context
            recent = position[:, :, None] - held[:, None, :] < self.context
            past = recent & (held >= 0)[:, None, :] & (start < 0)[:, :, None]
            mask = torch.cat([past, mask], 2)
        return mask.unsqueeze(1)

    def _remember(self, pairs: Tensor, ring: Tensor, start: Tensor, position: Tensor) -> Memory:
        """The ring after a sequence: the last steps since the last reset, each in its slot."""
        if ring.shape[1] == 0:
            ring = pairs.new_zeros(len(pairs), *self.ring)
        newest = slice(-self.context, None)
        slot = position[:, newest] % self.context
        # What was before the last reset goes to a slot of its own, which is dropped.
        slot = slot.masked_fill(start[:, newest] != start[:, -1:], self.context)
        wide = torch.cat([ring, ring[:, :, :, :1]], 3)
        index = slot[:, None, None, :, None, None].expand_as(pairs[:, :, :, newest])
        ring = wide.scatter(3, index, pairs[:, :, :, newest])[:, :, :, :-1]
        return ring.flatten(1), position[:, -1:] + 1


class Block(nn.Module):
    """Attention, then two layers on every step by itself; both are added to what they read."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.inputs = linear(size, 3 * size, gain=1.0)
        self.attended = linear(size, size, gain=0.0)
        self.layers = nn.Sequential(
            linear(size, 4 * size, gain=1.0), nn.GELU(), linear(4 * size, size, gain=0.0)
        )
        width = size // heads
        frequency = 10_000.0 ** -(torch.arange(0, width, 2) / width)  # Su et al. 2021, eq. 15
        self.frequency: Tensor
        self.register_buffer("frequency", frequency, persistent=False)

    def project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, T, heads, width), of steps (B, T) since the reset."""
        shape = (*x.shape[:2], 3 * self.heads, -1)
        query, key, value = self.inputs(self.attention_norm(x)).reshape(shape).chunk(3, 2)
        angle = position[..., None, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        return _rotate(query, cos, sin), _rotate(key, cos, sin), value

    def attend(
        self, x: Tensor, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """(B, T, D) after this block; without a mask a step sees all steps before it."""
        q, k, v = (part.transpose(1, 2) for part in (query, keys, values))
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.attended(seen.transpose(1, 2).flatten(2))
        return x + self.layers(self.norm(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)
