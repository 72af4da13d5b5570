"""Symbols, and observations of named parts."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from sequences import COLUMNS, STEPS

from dmrl_ray.config.schema import Component
from dmrl_ray.networks.combined import Combined
from dmrl_ray.networks.embedding import Embedding
from dmrl_ray.networks.recurrent import GRU
from dmrl_ray.tasks.spaces import Packed

WORDS = MultiDiscrete([5, 7, 7], start=[2, 2, 2])
SPACE = Packed(
    {
        "picture": Box(0, 255, (4, 4, 1), np.uint8),
        "speed": Box(-1.0, 1.0, (2,), np.float32),
        "word": WORDS,
        "key": Discrete(3),
    }
)
OBS = {
    "picture": np.random.default_rng(0).integers(256, size=(20, 4, 4, 1)).astype(np.uint8),
    "speed": np.random.default_rng(1).uniform(-1, 1, (20, 2)),
    "word": np.random.default_rng(2).integers(2, 7, (20, 3)),
    "key": np.random.default_rng(3).integers(3, size=20),
}


def make(kind, space, extra=0, **settings):
    torch.manual_seed(0)
    return kind(kind.Config.model_validate(settings), space, extra)


def packed(**changes):
    """(5, 4, D)."""
    return torch.from_numpy(SPACE.pack({**OBS, **changes})).unflatten(0, (5, 4))


def test_a_token_is_looked_up_and_several_are_averaged():
    encoder = make(Embedding, WORDS, size=4)
    assert encoder.table.weight.shape == (7, 4)
    tokens = torch.tensor([2.0, 8.0, 2.0]).reshape(1, 1, 3)
    expected = (2 * encoder.table.weight[0] + encoder.table.weight[6]) / 3
    torch.testing.assert_close(encoder(tokens, None, (), None)[0][0, 0], expected)


def test_a_one_hot_vector_is_looked_up():
    encoder = make(Embedding, Box(0.0, 1.0, (5,)), size=4)
    one_hot = torch.eye(5)[3].reshape(1, 1, 5)
    assert torch.equal(encoder(one_hot, None, (), None)[0][0, 0], encoder.table.weight[3])


@pytest.mark.parametrize(("pool", "same"), [("mean", True), ("gru", False)])
def test_a_gru_reads_tokens_in_their_order(pool, same):
    encoder = make(Embedding, WORDS, size=4, pool=pool)
    tokens = torch.randint(2, 7, (STEPS, COLUMNS, 3)).float()
    one, two = (encoder(x, None, (), None)[0] for x in (tokens, tokens.flip(-1)))
    assert torch.allclose(one, two) == same
    encoder.use_plain_operations()
    torch.testing.assert_close(encoder(tokens, None, (), None)[0], one)


def test_each_part_is_read_by_its_own_encoder_and_stands_in_its_place():
    encoder = make(Combined, SPACE, 2, parts={"speed": {"type": "mlp", "hidden_sizes": [3]}})
    kinds = [type(part).__name__ for part in encoder.parts]
    assert kinds == ["CNN", "MLP", "Embedding", "Embedding"]
    extra = torch.randn(5, 4, 2)
    whole, _ = encoder(packed(), extra, (), None)
    start = 0
    changes = {"picture": 255 - OBS["picture"], "speed": -OBS["speed"], "word": 8 - OBS["word"]}
    changes["key"] = (OBS["key"] + 1) % 3
    for name, part in zip(SPACE.parts, encoder.parts, strict=True):
        changed, _ = encoder(packed(**{name: changes[name]}), extra, (), None)
        moved = (changed != whole).any(0).any(0)
        mine = torch.zeros_like(moved)
        mine[start : start + part.out_dim] = True
        assert moved[mine].any()
        assert not moved[~mine].any()
        start += part.out_dim
    assert torch.equal(whole[..., start:], extra)


def test_a_trunk_reads_all_parts_and_may_have_memory():
    trunk = {"type": "gru", "hidden_size": 6}
    encoder, plain = make(Combined, SPACE, 2, trunk=trunk), make(Combined, SPACE, 2)
    plain.load_state_dict(encoder.state_dict(), strict=False)
    extra, memory = torch.randn(5, 4, 2), encoder.initial_memory(4)
    reset = torch.zeros(5, 4, dtype=torch.bool)
    reset[2, 1] = True
    features, after = encoder(packed(), extra, memory, reset)
    expected = encoder.trunk(plain(packed(), None, (), None)[0], extra, memory, reset)
    torch.testing.assert_close((features, after), expected)
    assert encoder.out_dim == 6


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        (Box(-1, 1, (3,)), {}, r"needs observations with named parts.*\(3,\)"),
        (SPACE, {"parts": {"sped": "mlp"}}, r"parts\.sped: .*did you mean 'speed'"),
        (SPACE, {"parts": {"speed": "gru"}}, r"parts\.speed: gru has memory"),
    ],
)
def test_a_mistake_names_its_setting(space, settings, message):
    with pytest.raises(ValueError, match=message):
        make(Combined, space, **settings)


def test_parts_keep_settings_of_their_own():
    component = Component.model_validate({"type": "embedding", "size": 9})
    assert make(Combined, SPACE, parts={"word": component}).parts[2].out_dim == 9


def test_plain_operations_reach_the_parts_of_a_body():
    parts = {"word": {"type": "embedding", "pool": "gru"}}
    encoder = make(GRU, SPACE, hidden_size=4, torso={"type": "combined", "parts": parts})
    memory = encoder.initial_memory(4)
    fused = encoder(packed(), None, memory, None)
    encoder.use_plain_operations()
    assert encoder.torso.parts[2].plain
    torch.testing.assert_close(encoder(packed(), None, memory, None), fused)
