"""Parts of a policy by the names of its parameters: which of them move, and which are frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

HEADS = ("policy_head.", "value_head.")
ENCODERS = ("encoder.", "value_encoder.")


def select(setting: str, parts: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that are chosen by any of `parts`.

    Args:
        setting: for error messages.
        parts: prefixes (``policy_head``), shell patterns (``*adapter*``), or ``last:n``, the heads
            and the last n - 1 layers of the encoders.
        names: of all parameters, in the order in which a policy has them.

    Raises:
        ValueError: one of `parts` chooses nothing.
    """
    names = list(names)
    chosen: set[str] = set()
    for part in parts:
        if match := re.fullmatch(r"last:([1-9]\d*)", part):
            chosen |= _last(int(match[1]), names)
        elif "*" in part:
            found = {name for name in names if fnmatchcase(name, part)}
            if not found:
                raise ValueError(
                    f"{setting}: no parameter's name is like {part!r}; {_known(names)}"
                )
            chosen |= found
        else:
            check_prefixes(setting, (part,), names)
            chosen |= {name for name in names if name.startswith(part)}
    return chosen


def check_prefixes(setting: str, prefixes: tuple[str, ...], names: Iterable[str]) -> None:
    """Raise ValueError if a prefix begins the name of no parameter."""
    names = list(names)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(
                f"{setting}: no parameter's name starts with {prefix!r}; {_known(names)}"
            )


def _known(names: list[str]) -> str:
    parts = sorted({name.split(".")[0] for name in names})
    return f"parts that can be chosen are {', '.join(parts)}"


def _last(count: int, names: list[str]) -> set[str]:
    chosen = {name for name in names if name.startswith(HEADS)}
    for encoder in ENCODERS:
        layers: list[list[str]] = []
        for name in names:
            if name.startswith(encoder):
                if not layers or _begins_layer(name, layers[-1]):
                    layers.append([])
                layers[-1].append(name)
        chosen.update(*layers[max(0, len(layers) + 1 - count) :])
    return chosen


def _begins_layer(name: str, layer: list[str]) -> bool:
    """Norms and adapters belong to the layer before them, and so do more weights of a module."""
    module, _, last = name.rpartition(".")
    is_between = "norm" in module or "adapter" in module
    return last.startswith("weight") and not is_between and module != layer[0].rpartition(".")[0]
