"""Encoders: memory over steps and resets, images, and the vector that joins observations."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from dmrl_ray.config import Component
from dmrl_ray.networks.cnn import CNN
from dmrl_ray.networks.mlp import MLP
from dmrl_ray.networks.recurrent import GRU, LSTM

CELLS = [LSTM, GRU]
STEPS, COLUMNS = 7, 4


def make(kind, obs_shape=(3,), extra=0, **settings):
    torch.manual_seed(0)
    space = Box(-np.inf, np.inf, obs_shape, np.float32)
    return kind(kind.Config.model_validate(settings), space, extra)


def sequence(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, COLUMNS, 3, generator=g)


def random_memory(encoder):
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(leaf.shape, generator=g) for leaf in encoder.initial_memory(COLUMNS))


def some_resets():
    """In the middle, several columns at once, on neighbouring steps, and at the start."""
    reset = torch.zeros(STEPS, COLUMNS, dtype=torch.bool)
    for t, b in ((0, 3), (2, 0), (2, 1), (3, 1), (6, 2)):
        reset[t, b] = True
    return reset


def step_by_step(encoder, obs, memory, reset):
    """Column by column and step by step, with memory zeroed by hand."""
    columns = []
    for b in range(obs.shape[1]):
        mine, outputs = tuple(leaf[b : b + 1] for leaf in memory), []
        for t in range(obs.shape[0]):
            if reset[t, b]:
                mine = encoder.initial_memory(1)
            out, mine = encoder(obs[t : t + 1, b : b + 1], None, mine, None)
            outputs.append(out)
        columns.append((torch.cat(outputs), mine))
    features = torch.cat([out for out, _ in columns], 1)
    return features, tuple(
        torch.cat(leaves) for leaves in zip(*(m for _, m in columns), strict=True)
    )


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("reset", [None, "some"])
def test_a_whole_sequence_in_one_call_equals_step_by_step(kind, reset):
    encoder = make(kind, size=5)
    memory = random_memory(encoder)
    never = torch.zeros(STEPS, COLUMNS, dtype=torch.bool)
    reset = None if reset is None else some_resets()
    features, after = encoder(sequence(), None, memory, reset)
    expected = step_by_step(encoder, sequence(), memory, never if reset is None else reset)
    torch.testing.assert_close((features, after), expected)


@pytest.mark.parametrize("kind", CELLS)
def test_a_sequence_can_be_cut_anywhere(kind):
    encoder, reset = make(kind, size=5), some_resets()
    memory = random_memory(encoder)
    whole, after = encoder(sequence(), None, memory, reset)
    for cut in range(1, STEPS):
        first, between = encoder(sequence()[:cut], None, memory, reset[:cut])
        second, end = encoder(sequence()[cut:], None, between, reset[cut:])
        torch.testing.assert_close((torch.cat([first, second]), end), (whole, after))


@pytest.mark.parametrize("kind", CELLS)
def test_a_reset_cuts_memory_and_gradient(kind):
    encoder, obs = make(kind, size=5), sequence().requires_grad_()
    reset = torch.zeros(STEPS, COLUMNS, dtype=torch.bool)
    reset[3, 0] = True
    features, _ = encoder(obs, None, random_memory(encoder), reset)
    features[5].sum().backward()
    assert (obs.grad[:3, 0] == 0).all()  # column 0 forgot what came before step 3
    assert (obs.grad[3:6, 0] != 0).any(-1).all()
    assert (obs.grad[:6, 1:] != 0).any(-1).all()  # the others did not


@pytest.mark.parametrize("kind", CELLS)
def test_the_memory_at_the_start_matters_where_it_is_not_reset(kind):
    encoder, reset = make(kind, size=5), some_resets()
    one, _ = encoder(sequence(), None, random_memory(encoder), reset)
    other, _ = encoder(sequence(), None, encoder.initial_memory(COLUMNS), reset)
    differs = (one[0] != other[0]).any(-1)
    assert differs.tolist() == [True, True, True, False]


@pytest.mark.parametrize("kind", CELLS)
def test_gates_start_orthogonal_and_without_bias(kind):
    encoder = make(kind, size=5)
    for gate in encoder.cell.weight_hh_l0.split(5):
        torch.testing.assert_close(gate @ gate.T, torch.eye(5), atol=1e-5, rtol=0)
    assert (encoder.cell.bias_hh_l0 == 0).all()
    assert (encoder.cell.bias_ih_l0 == 0).all()


def test_layers_start_orthogonal_with_the_gain_of_relu():
    encoder = make(MLP, sizes=(8,), obs_shape=(3,))
    weight = encoder.layers[0].weight
    torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [MLP, LSTM, GRU])
def test_the_extra_vector_stands_behind_the_observation(kind):
    # Joined by hand, an encoder of five inputs is one of three and two extra.
    torch.manual_seed(0)
    joined, apart = make(kind, (5,)), make(kind, (3,), 2)
    apart.load_state_dict(joined.state_dict())
    obs, extra = sequence(), torch.randn(STEPS, COLUMNS, 2)
    memory = joined.initial_memory(COLUMNS)
    expected = joined(torch.cat([obs, extra], -1), None, memory, None)
    torch.testing.assert_close(apart(obs, extra, memory, None), expected)


def test_a_cnn_joins_the_extra_vector_behind_the_convolutions():
    encoder = make(CNN, (6, 5, 3), 2, sizes=(7,))
    images = torch.rand(STEPS, COLUMNS, 6, 5, 3)
    extra = torch.zeros(STEPS, COLUMNS, 2, requires_grad=True)
    features, memory = encoder(images, extra, (), None)
    features.sum().backward()
    assert features.shape == (STEPS, COLUMNS, 7)
    assert memory == ()
    assert (extra.grad != 0).any(-1).all()


def test_a_cnn_reads_height_width_and_channels_in_that_order():
    # One 1x1 convolution that copies the second channel, then one layer that picks a pixel.
    encoder = make(CNN, (4, 5, 3), channels=(1,), kernel=1, sizes=(1,), activation="relu")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.convolutions[0].weight[0, 1] = 1
        encoder.layers[0].weight[0, 2 * 5 + 3] = 1  # row 2, column 3
    image = torch.rand(1, 1, 4, 5, 3)
    assert encoder(image, None, (), None)[0].item() == image[0, 0, 2, 3, 1].item()


def test_every_image_of_a_sequence_is_read_alone():
    encoder = make(CNN, (4, 5, 3))
    images = torch.rand(STEPS, COLUMNS, 4, 5, 3)
    whole, _ = encoder(images, None, (), None)
    torch.testing.assert_close(whole[2:3, 1:2], encoder(images[2:3, 1:2], None, (), None)[0])


def test_a_cnn_for_vectors_is_refused():
    with pytest.raises(ValueError, match=r"network\.encoder.*image.*\(3,\).*mlp"):
        make(CNN, (3,))


@pytest.mark.parametrize("kind", [MLP, CNN])
def test_without_layers_the_features_are_what_came_before(kind):
    encoder = make(kind, (4, 5, 3), 2, sizes=())
    obs, extra = torch.rand(STEPS, COLUMNS, 4, 5, 3), torch.rand(STEPS, COLUMNS, 2)
    features, _ = encoder(obs, extra, (), None)
    assert features.shape[-1] == encoder.out_dim
    torch.testing.assert_close(features[..., -2:], extra)


def test_a_memory_behind_a_cnn_reads_its_features():
    body = Component.model_validate({"type": "cnn", "channels": [4], "sizes": [6]})
    encoder = make(LSTM, (4, 5, 3), 2, size=5, body=body)
    images, extra = torch.rand(STEPS, COLUMNS, 4, 5, 3), torch.rand(STEPS, COLUMNS, 2)
    features, memory = encoder(images, extra, encoder.initial_memory(COLUMNS), None)
    expected = encoder.cell(encoder.body(images, extra, (), None)[0])[0]
    torch.testing.assert_close(features, expected)
    assert [leaf.shape for leaf in memory] == [(COLUMNS, 5)] * 2
