"""Compares the arrays of two runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

Arrays = Mapping[str, np.ndarray]

SHOWN = 4
"""Maximum number of arrays listed per checkpoint file or job; the others are counted."""


@dataclass
class Found:
    """The result of a comparison.

    Attributes:
        lines: differences by case.
        only: columns and metrics of one side only, by side; they are listed but do not count as
            differences.
        kinds: for each column, metric or kind of checkpoint file, the cases in which it differs.
        compared: number of arrays that both sides have.
    """

    lines: dict[str, list[str]] = field(default_factory=dict)
    only: dict[str, set[str]] = field(default_factory=lambda: {"OLD": set(), "NEW": set()})
    kinds: dict[str, set[str]] = field(default_factory=dict)
    compared: int = 0

    def report(self) -> str:
        """Returns a text: differences by case, then the number of cases by kind of difference."""
        parts = []
        for case, lines in self.lines.items():
            parts += [case, *(f"    {line}" for line in lines)]
        parts += [f"only in {side}: {', '.join(sorted(n))}" for side, n in self.only.items() if n]
        kinds = [f"{kind} {len(cases)}" for kind, cases in sorted(self.kinds.items())]
        parts += [f"cases by difference: {', '.join(kinds)}"] if kinds else []
        differing = f"cases that differ: {len(self.lines)}"
        return "\n".join([*parts, f"{self.compared} arrays compared; {differing}"])


def compare(case: str, old: Arrays, new: Arrays, found: Found) -> None:
    """Adds the differences between the two sides of a case to `found`, in the order of the run."""
    listed: dict[str, list[str]] = {}
    for group, names in _grouped({**old, **new}).items():
        both = [name for name in names if name in old and name in new]
        found.compared += len(both)
        heading = "/".join(group.split("/")[:2])
        for name, text in [
            *_on_one_side(group, names, {"OLD": old, "NEW": new}, found),
            *_differing(group, {n: old[n] for n in both}, {n: new[n] for n in both}),
        ]:
            short = name.removeprefix(heading).removeprefix("/").removesuffix("/value")
            listed.setdefault(heading, []).append(f"{short} {text}".strip())
            found.kinds.setdefault(_kind(heading, short), set()).add(case)
    for heading, texts in listed.items():
        rest = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
        line = f"{heading}: {'; '.join([*texts[:SHOWN], *rest])}"
        found.lines.setdefault(case, []).append(line)


def _kind(heading: str, name: str) -> str:
    """Returns the kind of a difference, such as ``episodes.return`` or ``weights of trained``."""
    table, _, job = heading.partition("/")
    return f"weights of {job.split('.')[0]}" if table == "weights" else f"{table}.{name or 'rows'}"


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names by checkpoint file, or by table and job (and metric), which share rows."""
    groups: dict[str, list[str]] = {}
    for name in names:
        depth = 2 if name.startswith("weights/") else name.count("/")
        groups.setdefault("/".join(name.split("/")[:depth]), []).append(name)
    return groups


def _on_one_side(
    group: str, names: list[str], sides: Mapping[str, Arrays], found: Found
) -> Iterator[tuple[str, str]]:
    """Yields arrays of one side only; columns and metrics are added to `found` instead."""
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
    """Yields each array of a group that differs, or a difference of the whole group."""
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
    """Returns the columns of a table, with rows sorted by all columns."""
    flat = [part for column in columns.values() for part in column.reshape(len(column), -1).T]
    order = np.lexsort(flat)
    return [column[order] for column in flat]


def identical(old: np.ndarray, new: np.ndarray) -> bool:
    """Returns whether arrays are bitwise equal; text may be stored at another width."""
    if old.dtype.kind == new.dtype.kind == "U":
        return old.shape == new.shape and bool((old == new).all())
    return (old.dtype, old.shape) == (new.dtype, new.shape) and old.tobytes() == new.tobytes()


def size_of(old: np.ndarray, new: np.ndarray) -> str:
    """Returns a description of the difference between two arrays."""
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
