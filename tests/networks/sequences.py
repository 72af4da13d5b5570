"""What tests of encoders share: small inputs, and acting step by step."""

import numpy as np
import torch
from gymnasium.spaces import Box

STEPS, COLUMNS = 7, 4


def make(kind, obs_shape=(3,), extra=0, **settings):
    torch.manual_seed(0)
    space = Box(-np.inf, np.inf, obs_shape, np.float32)
    return kind(kind.Config.model_validate(settings), space, extra)


def sequence(seed=0, width=3, steps=STEPS):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps, COLUMNS, width, generator=g)


def random_memory(encoder):
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(leaf.shape, generator=g) for leaf in encoder.initial_memory(COLUMNS))


def some_resets():
    """In the middle, several columns at once, on neighbouring steps, and at the start."""
    reset = torch.zeros(STEPS, COLUMNS, dtype=torch.bool)
    for t, b in ((0, 3), (2, 0), (2, 1), (3, 1), (6, 2)):
        reset[t, b] = True
    return reset


def step_by_step(encoder, obs, memory, reset, extra=None):
    """Column by column and step by step, with the memory of a reset made anew."""
    columns = []
    for b in range(obs.shape[1]):
        mine, outputs = tuple(leaf[b : b + 1] for leaf in memory), []
        for t in range(obs.shape[0]):
            if reset is not None and reset[t, b]:
                mine = encoder.initial_memory(1)
            now = None if extra is None else extra[t : t + 1, b : b + 1]
            out, mine = encoder(obs[t : t + 1, b : b + 1], now, mine, None)
            outputs.append(out)
        columns.append((torch.cat(outputs), mine))
    features = torch.cat([out for out, _ in columns], 1)
    leaves = zip(*(memory for _, memory in columns), strict=True)
    return features, tuple(torch.cat(leaf) for leaf in leaves)
