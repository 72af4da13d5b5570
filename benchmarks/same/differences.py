"""What differs between the arrays of two runs, and how much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

Arrays = Mapping[str, np.ndarray]

SHOWN = 4
"""Arrays told of one checkpoint file, or columns of one job in a table; the rest is counted."""


@dataclass
class Found:
    """What a comparison of two sides found.

    Attributes:
        lines: what differs, by case.
        only: columns and metrics that one side has and the other does not, by side; they are
            listed and do not count.
        kinds: cases in which a column, a metric or a kind of checkpoint file differs.
        compared: arrays that both sides have.
    """

    lines: dict[str, list[str]] = field(default_factory=dict)
    only: dict[str, set[str]] = field(default_factory=lambda: {"OLD": set(), "NEW": set()})
    kinds: dict[str, set[str]] = field(default_factory=dict)
    compared: int = 0

    def report(self) -> str:
        """All of it as text: case by case, then what differs in how many cases."""
        parts = []
        for case, lines in self.lines.items():
            parts += [case, *(f"    {line}" for line in lines)]
        parts += [f"only in {side}: {', '.join(sorted(n))}" for side, n in self.only.items() if n]
        kinds = [f"{kind} {len(cases)}" for kind, cases in sorted(self.kinds.items())]
        parts += [f"cases by what differs: {', '.join(kinds)}"] if kinds else []
        differing = f"cases that differ: {len(self.lines)}"
        return "\n".join([*parts, f"{self.compared} arrays compared; {differing}"])


def compare(case: str, old: Arrays, new: Arrays, found: Found) -> None:
    """Add to `found` what differs between the two sides of a case, in the order of the run."""
    told: dict[str, list[str]] = {}
    for group, names in _grouped({**old, **new}).items():
        both = [name for name in names if name in old and name in new]
        found.compared += len(both)
        heading = "/".join(group.split("/")[:2])
        for name, text in [
            *_on_one_side(group, names, {"OLD": old, "NEW": new}, found),
            *_differing(group, {n: old[n] for n in both}, {n: new[n] for n in both}),
        ]:
            short = name.removeprefix(heading).removeprefix("/").removesuffix("/value")
            told.setdefault(heading, []).append(f"{short} {text}".strip())
            found.kinds.setdefault(_kind(heading, short), set()).add(case)
    for heading, texts in told.items():
        rest = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
        line = f"{heading}: {'; '.join([*texts[:SHOWN], *rest])}"
        found.lines.setdefault(case, []).append(line)


def _kind(heading: str, name: str) -> str:
    """What a difference is of, over cases and jobs: ``episodes.return``, ``weights of trained``."""
    table, _, job = heading.partition("/")
    return f"weights of {job.split('.')[0]}" if table == "weights" else f"{table}.{name or 'rows'}"


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what has rows in common: a job in a table, or its metric; or by checkpoint file."""
    groups: dict[str, list[str]] = {}
    for name in names:
        depth = 2 if name.startswith("weights/") else name.count("/")
        groups.setdefault("/".join(name.split("/")[:depth]), []).append(name)
    return groups


def _on_one_side(
    group: str, names: list[str], sides: Mapping[str, Arrays], found: Found
) -> Iterator[tuple[str, str]]:
    """What one side lacks: columns and metrics are put into `found`, the rest is told."""
    table, *where = group.split("/")
    for side, arrays in sides.items():
        alone = [n for n in names if n in arrays and any(n not in s for s in sides.values())]
        whole = len(alone) == len(names)
        if table == "metrics" and whole:
            found.only[side] |= {f"metric {'/'.join(where[1:])}"}
        elif table != "weights" and not whole:
            found.only[side] |= {f"{table}.{name.split('/')[-1]}" for name in alone}
        else:
            yield from ((n, f"only in {side}") for n in ([group] if whole else alone))


def _differing(group: str, old: Arrays, new: Arrays) -> Iterator[tuple[str, str]]:
    """Each array of a group that differs, and how; or the group where that tells it."""
    names = [name for name in old if not identical(old[name], new[name])]
    if names and not group.startswith("weights/"):
        rows = [len(next(iter(side.values()))) for side in (old, new)]
        if rows[0] != rows[1]:
            yield group, f"{rows[0]} rows in OLD and {rows[1]} in NEW"
            return
        if all(map(identical, _in_order(old), _in_order(new))):
            yield group, "the same rows in another order"
            return
    for name in names:
        yield name, size_of(old[name], new[name])


def _in_order(columns: Arrays) -> list[np.ndarray]:
    """The columns of a table, its rows sorted by all of them."""
    flat = [part for column in columns.values() for part in column.reshape(len(column), -1).T]
    order = np.lexsort(flat)
    return [column[order] for column in flat]


def identical(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether every bit is the same; text may be stored at another width."""
    if old.dtype.kind == new.dtype.kind == "U":
        return old.shape == new.shape and bool((old == new).all())
    return (old.dtype, old.shape) == (new.dtype, new.shape) and old.tobytes() == new.tobytes()


def size_of(old: np.ndarray, new: np.ndarray) -> str:
    """How much two arrays differ, in words."""
    if old.shape != new.shape:
        return f"has shape {old.shape} in OLD, {new.shape} in NEW"
    text = [array.dtype.kind == "U" for array in (old, new)]
    differs = (old != new) & ~(_nan(old) & _nan(new)) if text[0] == text[1] else np.empty(0)
    if not differs.any():
        kinds = f"is {old.dtype} in OLD, {new.dtype} in NEW"
        return kinds if old.dtype != new.dtype else "has other signs of 0 or bits of NaN"
    share = f"in {int(differs.sum())} of {differs.size}"
    if all(text):
        a, b = str(old[differs][0]), str(new[differs][0])
        return f"{share}, first {_short(a)} in OLD, {_short(b)} in NEW"
    distance = np.abs(old[differs].astype(float) - new[differs].astype(float))
    if np.isnan(distance).any():
        return f"{share}, NaN on one side"
    return f"by up to {distance.max():.2g} {share}"


def _nan(array: np.ndarray) -> np.ndarray:
    return np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
