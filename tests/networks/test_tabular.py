"""A memory that keeps apart what was seen in different places."""

import pytest
import torch
from torch.nn.functional import one_hot

from dmrl_ray.networks.tabular import Tabular
from tests.networks.sequences import COLUMNS, STEPS, make, some_resets

PLACES, ACTIONS = 3, 4


def tabular(**settings):
    return make(Tabular, obs_shape=(PLACES,), extra=ACTIONS + 2, hidden_size=6, width=4, **settings)


def walk(place, action, reward):
    """Observations and extras of one column: an action is seen one step after it was taken."""
    obs = one_hot(torch.tensor(place), PLACES).float().unsqueeze(1)
    extra = torch.zeros(len(place), 1, ACTIONS + 2)
    for t, (a, r) in enumerate(zip(action[:-1], reward[:-1], strict=True)):
        extra[t + 1, 0, a], extra[t + 1, 0, ACTIONS] = 1.0, r
    return obs, extra


def random_walk(seed=0):
    g = torch.Generator().manual_seed(seed)
    obs = one_hot(torch.randint(PLACES, (STEPS, COLUMNS), generator=g), PLACES).float()
    action = one_hot(torch.randint(ACTIONS, (STEPS, COLUMNS), generator=g), ACTIONS).float()
    rest = torch.randn(STEPS, COLUMNS, 2, generator=g)
    return obs, torch.cat([action, rest], -1)


def cells(encoder, place, action, reward):
    """(S, A, H) after a walk."""
    _, (memory, _) = encoder(*walk(place, action, reward), encoder.initial_memory(1), None)
    return memory.reshape(PLACES, ACTIONS, -1)


def test_a_step_changes_the_cell_of_its_place_and_action_alone():
    after = cells(tabular(), place=[2, 0], action=[1, 3], reward=[5.0, 0.0])
    changed = after.abs().sum(-1).nonzero().tolist()
    assert changed == [[2, 1]]


def test_what_an_action_paid_elsewhere_does_not_reach_its_cell_here():
    encoder = tabular()
    one, two = (cells(encoder, [0, 1, 0], [2, 2, 0], [1.0, r, 0.0]) for r in (0.0, 9.0))
    torch.testing.assert_close(one[0], two[0])
    assert not torch.allclose(one[1], two[1])


@pytest.mark.parametrize("reset", [None, "some"])
def test_a_whole_sequence_in_one_call_equals_step_by_step(reset):
    encoder, (obs, extra) = tabular(), random_walk()
    reset = None if reset is None else some_resets()
    if reset is not None:  # nothing came before a reset
        extra[reset] = 0.0
    memory = encoder.initial_memory(COLUMNS)
    whole, last = encoder(obs, extra, memory, reset)
    parts = []
    for t in range(STEPS):
        now = None if reset is None else reset[t : t + 1]
        part, memory = encoder(obs[t : t + 1], extra[t : t + 1], memory, now)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole)
    for a, b in zip(memory, last, strict=True):
        torch.testing.assert_close(a, b)


def test_images_are_refused():
    with pytest.raises(ValueError, match="tabular needs one-hot observations"):
        make(Tabular, obs_shape=(4, 4, 1), extra=ACTIONS + 2)
