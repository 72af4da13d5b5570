"""Weights that RLlib trained, as the start of a policy of ours, matched by their names.

What was exported from here comes back whole. Of RLlib's own networks those of dense layers, with an
LSTM or without, have a counterpart, if sizes and activations are set alike (RLlib's default is
tanh). RLlib itself is not needed to read them.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmrl_ray.config.schema import RLLIB
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.spec import get_weights
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.types import Arrays

STATE_FILE = "module_state.pkl"
PLACES = (
    "learner_group/learner/rl_module/default_policy",
    "learner/rl_module/default_policy",
    "rl_module/default_policy",
    "default_policy",
    ".",
)
"""Where the module lies in a checkpoint of an algorithm, of its learners, of all its modules."""

_RENAMED = (
    (r"^policy\.", ""),  # exported from here
    (r"^(encoder\.(encoder|actor_encoder)|_encoder)\.", "encoder."),
    (r"^encoder\.critic_encoder\.", "value_encoder."),
    (r"^(pi|_pi_head)\.", "policy_head."),
    (r"^vf\.", "value_head."),
    (r"\.tokenizer\.net\.mlp\.", ".torso.layers."),
    (r"\.net\.mlp\.", ".layers."),
    (r"\.lstm\.", ".cell."),
)
_HEADS = {"policy_head.layers.0.": "policy_head.layer.", "value_head.layers.0.": "value_head."}
_CONSTANT = "log_std_clip_param_const"


@dataclass(frozen=True)
class Start:
    """The weights that a policy starts from, and where they came from."""

    weights: Arrays  # of the whole policy of ours
    matched: dict[str, str]  # our name: theirs
    missing: list[str]  # ours, left as they were made
    unused: list[str]  # theirs

    def table(self) -> str:
        """A line for each weight."""
        width = max(map(len, self.weights))
        rows = [
            f"{name:{width}}  {self.weights[name].shape!s:12}  {self.matched.get(name, 'missing')}"
            for name in self.weights
        ]
        return "\n".join([*rows, *(f"{'unused':{width}}  {'':12}  {name}" for name in self.unused)])


def rllib_start(source: str, policy: ActorCritic) -> Start:
    """Weights of an RLlib checkpoint in the place of those of `policy`, which stays as it is.

    Unpickles: only for a source that is trusted.

    Args:
        source: ``rllib:PATH`` of a checkpoint of an algorithm or a module.
        policy: of ours.

    Raises:
        ValueError: it cannot be read, or does not fit.
    """
    path = Path(source.removeprefix(RLLIB))
    theirs = {_our_name(n): (n, x) for n, x in _read(path).items() if not n.endswith(_CONSTANT)}
    for begin, end in _HEADS.items():
        if not any(name.startswith(begin.replace("0.", "2.")) for name in theirs):
            theirs = {n.replace(begin, end): found for n, found in theirs.items()}
    own = get_weights(policy)
    matched = {name: theirs[name][0] for name in own if name in theirs}
    if not matched:
        raise ConfigError(f"init_from: {path}: has no weight that this network has")
    new = {name: np.asarray(theirs[name][1], own[name].dtype) for name in matched}
    _check(path, policy, own, new)
    if "value_head.weight" in new and "value_norm.mean" not in new and "value_norm.mean" in own:
        # Else the first update would take its scale on without keeping what RLlib's critic says.
        new["value_norm.batches"] = np.ones_like(own["value_norm.batches"])
    return Start(
        {**own, **new},
        matched,
        [name for name in own if name not in new],
        [found for name, (found, _) in theirs.items() if name not in own],
    )


def _read(path: Path) -> dict[str, object]:
    for place in PLACES:
        file = path / place / STATE_FILE
        if file.is_file():
            break
    else:
        found = sorted(str(file.parent) for file in path.rglob(STATE_FILE))
        known = f"; there are modules in {', '.join(found)}" if found else ""
        raise ConfigError(f"init_from: {path}: is no RLlib checkpoint of a default_policy{known}")
    try:
        state = pickle.loads(file.read_bytes())
    except Exception as error:  # Unpickling may raise anything.
        raise ConfigError(f"init_from: {file}: cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ConfigError(f"init_from: {file}: holds no weights")
    return state


def _our_name(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _check(path: Path, policy: ActorCritic, own: Arrays, new: Arrays) -> None:
    wrong = [
        f"{name} has shape {array.shape} instead of {own[name].shape}"
        for name, array in new.items()
        if array.shape != own[name].shape
    ]
    if wrong:
        layer = "policy_head.layer.bias"
        twice = layer in new and len(new[layer]) == 2 * len(own[layer])
        hint = (
            "; only RLlib's free_log_std: True has one standard deviation, as here" if twice else ""
        )
        raise ConfigError(
            f"init_from: {path}: does not fit the network; set its sizes alike: "
            + "; ".join(wrong)
            + hint
        )
    if policy.obs_norm is not None and "obs_norm.mean" not in new:
        raise ConfigError(
            "network.normalize_obs: RLlib's policy reads observations as they are; use false"
        )
