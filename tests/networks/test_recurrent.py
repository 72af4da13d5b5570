"""Recurrent encoders: memory over steps and resets, step by step and in one call."""

import pytest
import torch
from sequences import COLUMNS, STEPS, make, random_memory, sequence, some_resets, step_by_step

from dmrl_ray.config.schema import Component
from dmrl_ray.networks.recurrent import GRU, LSTM, RNN

CELLS = [LSTM, GRU, RNN]


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("reset", [None, "some"])
def test_a_whole_sequence_in_one_call_equals_step_by_step(kind, reset):
    encoder = make(kind, hidden_size=5)
    memory = random_memory(encoder)
    reset = None if reset is None else some_resets()
    features, after = encoder(sequence(), None, memory, reset)
    expected = step_by_step(encoder, sequence(), memory, reset)
    torch.testing.assert_close((features, after), expected)


@pytest.mark.parametrize("kind", CELLS)
def test_a_sequence_can_be_cut_anywhere(kind):
    encoder, reset = make(kind, hidden_size=5), some_resets()
    memory = random_memory(encoder)
    whole, after = encoder(sequence(), None, memory, reset)
    for cut in range(1, STEPS):
        first, between = encoder(sequence()[:cut], None, memory, reset[:cut])
        second, end = encoder(sequence()[cut:], None, between, reset[cut:])
        torch.testing.assert_close((torch.cat([first, second]), end), (whole, after))


@pytest.mark.parametrize("kind", CELLS)
def test_a_reset_cuts_memory_and_gradient(kind):
    encoder, obs = make(kind, hidden_size=5), sequence().requires_grad_()
    reset = torch.zeros(STEPS, COLUMNS, dtype=torch.bool)
    reset[3, 0] = True
    features, _ = encoder(obs, None, random_memory(encoder), reset)
    features[5].sum().backward()
    assert (obs.grad[:3, 0] == 0).all()  # column 0 forgot what came before step 3
    assert (obs.grad[3:6, 0] != 0).any(-1).all()
    assert (obs.grad[:6, 1:] != 0).any(-1).all()  # the others did not


@pytest.mark.parametrize("kind", CELLS)
def test_the_memory_at_the_start_matters_where_it_is_not_reset(kind):
    encoder, reset = make(kind, hidden_size=5), some_resets()
    one, _ = encoder(sequence(), None, random_memory(encoder), reset)
    other, _ = encoder(sequence(), None, encoder.initial_memory(COLUMNS), reset)
    differs = (one[0] != other[0]).any(-1)
    assert differs.tolist() == [True, True, True, False]


@pytest.mark.parametrize("kind", CELLS)
def test_gates_start_orthogonal_and_without_bias(kind):
    encoder = make(kind, hidden_size=5)
    for gate in encoder.cell.weight_hh_l0.split(5):
        torch.testing.assert_close(gate @ gate.T, torch.eye(5), atol=1e-5, rtol=0)
    assert (encoder.cell.bias_hh_l0 == 0).all()
    assert (encoder.cell.bias_ih_l0 == 0).all()


def test_a_memory_behind_a_cnn_reads_its_features():
    torso = Component.model_validate({"type": "cnn", "channels": [4], "hidden_sizes": [6]})
    encoder = make(LSTM, (4, 5, 3), 2, hidden_size=5, torso=torso)
    images, extra = torch.rand(STEPS, COLUMNS, 4, 5, 3), torch.rand(STEPS, COLUMNS, 2)
    features, memory = encoder(images, extra, encoder.initial_memory(COLUMNS), None)
    expected = encoder.cell(encoder.torso(images, extra, (), None)[0])[0]
    torch.testing.assert_close(features, expected)
    assert [leaf.shape for leaf in memory] == [(COLUMNS, 5)] * 2


@pytest.mark.parametrize("settings", [{}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_plain_operations_compute_the_same(kind, settings):
    settings = settings if kind is RNN else {}
    encoder = make(kind, hidden_size=5, **settings)
    memory, reset = random_memory(encoder), some_resets()
    fused = encoder(sequence(), None, memory, reset)
    encoder.use_plain_operations()
    torch.testing.assert_close(encoder(sequence(), None, memory, reset), fused)


def test_features_are_normalised_and_the_memory_is_not():
    plain, normalised = (make(GRU, hidden_size=50, layer_norm=on) for on in (False, True))
    memory = plain.initial_memory(COLUMNS)
    _, memory_plain = plain(sequence(), None, memory, None)
    features, memory = normalised(sequence(), None, memory, None)
    torch.testing.assert_close(memory, memory_plain)
    torch.testing.assert_close(features.mean(-1), torch.zeros(STEPS, COLUMNS), atol=1e-5, rtol=0)
