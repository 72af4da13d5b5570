"""The gradient that an update would take its first step along."""

import numpy as np
import torch


def first_gradient(algorithm, trial):
    """Parameter by parameter; nothing is moved."""
    found = []

    def note(gradient):
        found.append(gradient.clone())
        return torch.full_like(gradient, torch.nan)  # such a step is not taken

    before = {name: x.clone() for name, x in algorithm.policy.state_dict().items()}
    algorithm.average_gradients, algorithm.rng = note, np.random.default_rng(0)
    algorithm.update(trial)
    algorithm.average_gradients = None
    algorithm.policy.load_state_dict(before)
    parameters = list(algorithm.policy.parameters())
    pieces = found[0].split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
