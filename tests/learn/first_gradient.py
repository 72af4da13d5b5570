"""The gradient steps of an update, seen from outside."""

import numpy as np
import pytest
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


def watched(algorithm, note):
    """The algorithm, which calls `note` with each minibatch before it steps."""
    descend = algorithm.descend

    def descending(loss, batch, *rest):
        note(batch)
        return descend(loss, batch, *rest)

    algorithm.descend = descending
    return algorithm


class Seen(Exception):
    """Ends an update before its first gradient step."""


def first_loss(algorithm, trial, change=lambda batch: None):
    """Loss and metrics of an update's first minibatch, which may be changed before."""
    found = []

    def note(loss, batch, *rest):
        change(batch)
        found.append(loss(batch))
        raise Seen

    algorithm.descend, algorithm.rng = note, np.random.default_rng(0)
    with pytest.raises(Seen):
        algorithm.update(trial)
    del algorithm.descend
    return found[0]
