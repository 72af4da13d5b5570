"""What differs between the arrays of two runs, and how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

Arrays = Mapping[str, np.ndarray]

SHOWN = 12
"""Lines of one case; the others are counted."""


@dataclass
class Found:
    """What a comparison of two sides found.

    Attributes:
        lines: what differs, by case.
        only: columns, metrics and tables that one side has and the other does not, by side; they
            are listed and do not count.
        compared: arrays that both sides have.
    """

    lines: dict[str, list[str]] = field(default_factory=dict)
    only: dict[str, set[str]] = field(default_factory=lambda: {"OLD": set(), "NEW": set()})
    compared: int = 0

    def report(self) -> str:
        """All of it as text."""
        parts = [f"only in {side}: {', '.join(sorted(n))}" for side, n in self.only.items() if n]
        for case, lines in self.lines.items():
            rest = len(lines) - SHOWN
            parts += [case, *(f"    {line}" for line in lines[:SHOWN])]
            parts += [f"    and {rest} more"] if rest > 0 else []
        differing = len(self.lines)
        return "\n".join(
            [*parts, f"{self.compared} arrays compared; cases that differ: {differing}"]
        )


def compare(case: str, old: Arrays, new: Arrays, found: Found) -> None:
    """Add to `found` what differs between the two sides of a case."""
    lines = []
    for group, names in _grouped(old.keys() | new.keys()).items():
        here = {
            "OLD": [n for n in names if n not in new],
            "NEW": [n for n in names if n not in old],
        }
        both = [name for name in names if name in old and name in new]
        found.compared += len(both)
        for side, missing in here.items():
            columns = [n for n in missing if not n.startswith("weights/") and both]
            found.only[side] |= {_without_stage(n) for n in columns}
            counted = [n for n in missing if n not in columns]
            if counted:
                lines.append(f"{group}: only in {side}: {_listed(counted, group)}")
        lines += _differing(group, {n: old[n] for n in both}, {n: new[n] for n in both})
    if lines:
        found.lines[case] = found.lines.get(case, []) + lines


def _grouped(names: set[str]) -> dict[str, list[str]]:
    """Names by checkpoint file, or by table, stage and metric: all but the last part."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        depth = 2 if name.startswith("weights/") else name.count("/")
        groups.setdefault("/".join(name.split("/")[:depth]), []).append(name)
    return groups


def _without_stage(name: str) -> str:
    parts = name.split("/")
    return f"{parts[0]}.{parts[-1]}"


def _listed(names: list[str], group: str) -> str:
    return ", ".join(name.removeprefix(group + "/") for name in names)


def _differing(group: str, old: Arrays, new: Arrays) -> Iterator[str]:
    """A line for each array of a group that differs, or one for all where that tells it."""
    names = [name for name in old if not identical(old[name], new[name])]
    table = not group.startswith("weights/")
    if not names:
        return
    rows = [{len(a) for a in side.values()} for side in (old, new)]
    if table and "transitions" not in group and rows[0] != rows[1]:
        counts = [" or ".join(map(str, sorted(r))) for r in rows]
        yield f"{group}: {counts[0]} rows in OLD, {counts[1]} in NEW"
        return
    if table and _sorted_identical(old, new):
        yield f"{group}: the same rows in another order"
        return
    for name in names:
        yield f"{name}: {size_of(old[name], new[name])}"


def _sorted_identical(old: Arrays, new: Arrays) -> bool:
    if len({len(a) for side in (old, new) for a in side.values()}) != 1:
        return False
    sides = []
    for side in (old, new):
        order = np.lexsort(list(side.values()))
        sides.append([array[order] for array in side.values()])
    return all(identical(a, b) for a, b in zip(*sides, strict=True))


def identical(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether every bit is the same; text may be stored at another width."""
    if old.dtype.kind == new.dtype.kind == "U":
        return old.shape == new.shape and bool((old == new).all())
    return (old.dtype, old.shape) == (new.dtype, new.shape) and old.tobytes() == new.tobytes()


def size_of(old: np.ndarray, new: np.ndarray) -> str:
    """How much two arrays differ, in words."""
    if old.shape != new.shape:
        return f"shape {old.shape} in OLD, {new.shape} in NEW"
    if old.dtype != new.dtype and "U" in (old.dtype.kind, new.dtype.kind):
        return f"{old.dtype} in OLD, {new.dtype} in NEW"
    differs = (old != new) & ~(_nan(old) & _nan(new))
    share = f"{int(differs.sum())} of {differs.size}"
    if not differs.any():
        return f"{old.dtype} in OLD, {new.dtype} in NEW" if old.dtype != new.dtype else "signs of 0"
    if old.dtype.kind == "U":
        first = np.flatnonzero(differs.ravel())[0]
        a, b = str(old.ravel()[first]), str(new.ravel()[first])
        return f"{share} differ, first {_short(a)} in OLD, {_short(b)} in NEW"
    distance = np.abs(old.astype(float) - new.astype(float))[differs]
    scale = np.abs(np.where(_nan(old), 0, old)).max()
    return f"{share} differ, by up to {np.nanmax(distance):.3g} (largest value {scale:.3g})"


def _nan(array: np.ndarray) -> np.ndarray:
    return np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
