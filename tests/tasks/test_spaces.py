"""Observations with named parts, and a critic that observes more than the actor."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Text

from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.tasks.spaces import Packed, scaled_columns

IMAGE = Box(0, 255, (2, 2, 1), np.uint8)
VECTOR = Box(-1.0, 1.0, (2,), np.float32)
SPACE = Packed(
    {"picture": IMAGE, "speed": VECTOR, "word": MultiDiscrete([9, 9]), "key": Discrete(3)}
)
OBS = {
    "picture": np.array([0, 51, 102, 255], np.uint8).reshape(1, 2, 2, 1),
    "speed": np.array([[0.5, -2.0]], np.float32),
    "word": np.array([[7, 1]]),
    "key": np.array([2]),
}


def test_parts_are_concatenated_each_on_its_scale():
    expected = [0.0, 0.2, 0.4, 1.0, 0.5, -2.0, 7.0, 1.0, 0.0, 0.0, 1.0]
    np.testing.assert_allclose(SPACE.pack(OBS)[0], expected, rtol=1e-6)


def test_a_part_is_returned_by_name_in_its_shape():
    packed = torch.from_numpy(SPACE.pack(OBS)).expand(4, 5, -1)
    assert SPACE.part(packed, "picture").shape == (4, 5, 2, 2, 1)
    assert SPACE.part(packed, "speed")[3, 2].tolist() == [0.5, -2.0]
    assert SPACE.part(packed, "key")[0, 0].tolist() == [0.0, 0.0, 1.0]


def test_only_entries_of_float_boxes_are_normalized_by_running_statistics():
    assert scaled_columns(SPACE).tolist() == [False] * 4 + [True] * 2 + [False] * 5


def test_a_part_of_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="part 'note' is a Text"):
        Packed({"speed": VECTOR, "note": Text(5)})


def policy(**settings):
    space = Packed({"obs": VECTOR, "task": Box(-1.0, 1.0, (3,), np.float32)})
    config = ActorCritic.Config(critic_only=("task",), normalize_obs=False, **settings)
    torch.manual_seed(0)
    return ActorCritic(config, space, Discrete(2), sees_previous=False)


@pytest.mark.parametrize("separate_value", [True, False])
def test_a_part_for_the_critic_alone_changes_the_value_and_not_the_action(separate_value):
    net = policy(separate_value=separate_value)
    obs = torch.randn(1, 4, 5)
    other = obs.clone()
    other[..., 2:] += 1.0
    assert torch.equal(net(obs)[0], net(other)[0])
    features, changed = net(obs)[1], net(other)[1]
    assert not torch.allclose(net.value(features, obs), net.value(changed, other))


def test_an_unknown_critic_only_part_is_named():
    with pytest.raises(ValueError, match="there is no 'tusk'"):
        ActorCritic(
            ActorCritic.Config(critic_only=("tusk",)), SPACE, Discrete(2), sees_previous=False
        )


def test_running_statistics_do_not_change_pixels_tokens_and_one_hots():
    net = ActorCritic(ActorCritic.Config(), SPACE, Discrete(2), sees_previous=False)
    obs = torch.from_numpy(SPACE.pack(OBS)).unsqueeze(0)
    net.obs_norm.mean += 100.0
    scaled = net.scale(obs)
    fixed = ~torch.from_numpy(scaled_columns(SPACE))
    assert torch.equal(scaled[..., fixed], obs[..., fixed])
    assert (scaled[..., ~fixed] == -10.0).all()
