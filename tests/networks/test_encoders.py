"""Encoders without memory: images, and the vector that joins observations."""

import pytest
import torch
from sequences import COLUMNS, STEPS, make, sequence

from dmrl_ray.networks.cnn import CNN, Residual
from dmrl_ray.networks.mlp import MLP
from dmrl_ray.networks.recurrent import GRU, LSTM, RNN


def test_layers_start_orthogonal_with_the_gain_of_relu():
    encoder = make(MLP, hidden_sizes=(8,), obs_shape=(3,))
    weight = encoder.layers[0].weight
    torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [MLP, LSTM, GRU, RNN])
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
    encoder = make(CNN, (6, 5, 3), 2, hidden_sizes=(7,))
    images = torch.rand(STEPS, COLUMNS, 6, 5, 3)
    extra = torch.zeros(STEPS, COLUMNS, 2, requires_grad=True)
    features, memory = encoder(images, extra, (), None)
    features.sum().backward()
    assert features.shape == (STEPS, COLUMNS, 7)
    assert memory == ()
    assert (extra.grad != 0).any(-1).all()


def test_a_cnn_reads_height_width_and_channels_in_that_order():
    # One 1x1 convolution that copies the second channel, then one layer that picks a pixel.
    encoder = make(CNN, (4, 5, 3), channels=(1,), kernel=1, hidden_sizes=(1,), activation="relu")
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
    encoder = make(kind, (4, 5, 3), 2, hidden_sizes=())
    obs, extra = torch.rand(STEPS, COLUMNS, 4, 5, 3), torch.rand(STEPS, COLUMNS, 2)
    features, _ = encoder(obs, extra, (), None)
    assert features.shape[-1] == encoder.out_dim
    torch.testing.assert_close(features[..., -2:], extra)


def ones(encoder):
    """The same encoder with every weight 1 and every bias 0."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return encoder


@pytest.mark.parametrize(("pool", "expected"), [("max", [4.0, 8.0]), ("average", [2.5, 6.5])])
def test_a_pooling_keeps_the_largest_or_the_mean_of_each_square(pool, expected):
    encoder = ones(make(CNN, (2, 4, 1), channels=(1,), kernel=1, pool=pool, hidden_sizes=()))
    image = torch.tensor([[1.0, 2.0, 5.0, 6.0], [3.0, 4.0, 7.0, 8.0]]).reshape(1, 1, 2, 4, 1)
    assert encoder(image, None, (), None)[0].flatten().tolist() == expected


def test_every_convolution_has_its_own_kernel_and_stride():
    encoder = make(CNN, (12, 12, 3), channels=(4, 5), kernel=(5, 3), stride=(3, 2), hidden_sizes=())
    convolutions = [m for m in encoder.convolutions if hasattr(m, "stride")]
    assert [m.weight.shape for m in convolutions] == [(4, 3, 5, 5), (5, 4, 3, 3)]
    assert encoder.out_dim == 5 * 2 * 2  # 12 -> 4 -> 2 pixels
    with pytest.raises(ValueError, match="kernel: 3 values for 2 convolutions"):
        make(CNN, (12, 12, 3), kernel=(5, 3, 3))


def test_a_residual_block_adds_to_what_it_reads():
    # Without its last convolutions a block adds nothing, and only the sections' own are left.
    settings = {"channels": (4,), "hidden_sizes": ()}
    encoder = make(Residual, (6, 6, 3), blocks=2, **settings)
    plain = make(Residual, (6, 6, 3), blocks=0, **settings)
    image = torch.rand(STEPS, COLUMNS, 6, 6, 3)
    with torch.no_grad():
        for block in encoder.convolutions[2:4]:
            block.layers[3].weight.zero_()
            block.layers[3].bias.zero_()
        plain.convolutions[0].load_state_dict(encoder.convolutions[0].state_dict())
        torch.testing.assert_close(encoder(image, None, (), None), plain(image, None, (), None))
        encoder.convolutions[2].layers[3].bias.fill_(1.0)
        assert not torch.allclose(
            encoder(image, None, (), None)[0], plain(image, None, (), None)[0]
        )


def test_each_section_of_a_residual_encoder_halves_the_image():
    encoder = make(Residual, (16, 16, 3), channels=(4, 6, 8), hidden_sizes=())
    assert encoder.out_dim == 8 * 2 * 2
