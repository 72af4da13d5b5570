"""Progress of a run: a live table on a terminal, single lines elsewhere.

Calls are cheap and never fail: they store the newest values and limit the rate of drawing. An
output that fails, closed (``| head``) or on a full disk, turns the display off with one line in the
log, and has no effect on the run.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

logger = logging.getLogger(__name__)

LINE_EVERY_S = 5.0
DRAW_EVERY_S = 0.25


@dataclass
class _Row:
    total_steps: int | None
    started: float
    state: str = "running"
    steps: int = 0
    sps: float | None = None
    return_: float | None = None
    score: float | None = None
    workers: str | None = None
    extra: dict[str, object] = field(default_factory=dict)
    shown: float = -math.inf  # Time at which the last line was printed.
    elapsed_s: float = 0.0

    @property
    def progress(self) -> str:
        return short(self.steps) + (f"/{short(self.total_steps)}" if self.total_steps else "")


class Display:
    """Shows the stages of a run; a context manager.

    Args:
        quiet: show nothing.
        every_s: seconds between lines of a stage, where the output is not a terminal.
        stream: the output; standard output if None.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        every_s: float = LINE_EVERY_S,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._quiet = quiet or self._stream is None  # None if a process has no output.
        self._every_s = every_s
        self._clock = clock
        self._rows: dict[str, _Row] = {}
        self._live: Live | None = None
        self._drawn = -math.inf

    def __enter__(self) -> Display:
        with self._outlived():
            if not self._quiet and self._stream.isatty():
                self._live = self._start_live()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the live table; its last state stays on the terminal."""
        if self._live is not None:
            self._draw(now=True)
        with self._outlived():
            if self._live is not None:
                self._live.stop()
        self._live = None

    def stage(self, name: str, total_steps: int | None = None) -> None:
        """Starts or continues a stage; `total_steps` is its budget of environment steps, if any."""
        self._rows[name] = _Row(total_steps, self._clock())
        self._draw()

    def update(
        self,
        stage: str,
        steps: int,
        sps: float | None = None,
        return_: float | None = None,
        score: float | None = None,
        workers_alive: int | tuple[int, int] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """Sets the newest values of a stage; None keeps the previous value.

        Args:
            stage: its name, as given to `stage`.
            steps: environment steps so far.
            sps: environment steps per second.
            return_: mean return of recent episodes.
            score: their mean score: 0 is the random policy, 1 the best known reference.
            workers_alive: number of responsive rollout workers, or (responsive, all).
            extra: other values, shown as ``name=value``.
        """
        row = self._rows.setdefault(stage, _Row(None, self._clock()))
        row.steps = steps
        row.sps = row.sps if sps is None else sps
        row.return_ = row.return_ if return_ is None else return_
        row.score = row.score if score is None else score
        if workers_alive is not None:
            pair = workers_alive if isinstance(workers_alive, tuple) else (workers_alive,)
            row.workers = "/".join(map(str, pair))
        row.extra |= extra or {}
        if self._live is not None:
            self._draw()
        elif self._clock() - row.shown >= self._every_s:
            self._line(stage, row)

    def finish(self, stage: str, state: str = "done") -> None:
        """Ends a stage as done, interrupted or failed."""
        row = self._rows.setdefault(stage, _Row(None, self._clock()))
        row.state, row.elapsed_s = state, self._clock() - row.started
        if self._live is not None:
            self._draw(now=True)
        else:
            self._line(stage, row)

    def message(self, text: str) -> None:
        """Shows a sentence above the table."""
        if self._live is not None:
            with self._outlived():
                self._live.console.print(text, markup=False, highlight=False)
        else:
            self._write(text)

    def urgent(self, text: str) -> None:
        """Shows a sentence at once, from a signal handler: past the buffers, on standard error."""
        if not self._quiet and sys.stderr is not None:
            with suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), f"{text}\n".encode())

    def _line(self, stage: str, row: _Row) -> None:
        row.shown = self._clock()
        cells = {
            "stage": stage,
            "state": row.state if row.state != "running" else None,
            "steps": row.progress,
            "sps": None if row.sps is None else short(row.sps),
            "return": None if row.return_ is None else f"{row.return_:.4g}",
            "score": None if row.score is None else f"{row.score:.2f}",
            "workers": row.workers,
            **row.extra,
            "elapsed": f"{row.elapsed_s:.1f}s" if row.state != "running" else None,
        }
        self._write(" ".join(f"{k}={_word(v)}" for k, v in cells.items() if v is not None))

    def _write(self, text: str) -> None:
        if self._quiet:
            return
        with self._outlived():
            print(text, file=self._stream, flush=True)

    @contextmanager
    def _outlived(self) -> Iterator[None]:
        """Turn the display off where the output fails."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._live, self._quiet = None, True
            logger.warning("the display is off, as its output fails: %s", error)

    def _start_live(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        class Outlived(Console):
            def on_broken_pipe(self) -> None:  # Rich would end the process.
                raise BrokenPipeError("closed")

        live = Live(self._table(), console=Outlived(file=self._stream), auto_refresh=False)
        live.start()
        return live

    def _draw(self, now: bool = False) -> None:
        if self._live is None or not (now or self._clock() - self._drawn >= DRAW_EVERY_S):
            return
        self._drawn = self._clock()
        with self._outlived():
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(self._rows))
        for title in ("stage", "state", "", "steps", "steps/s", "return", "score", "workers", ""):
            figures = title in ("steps", "steps/s", "return", "score", "workers")
            table.add_column(title, justify="right" if figures else "left", no_wrap=True)
        for name, row in self._rows.items():
            done = row.state == "done"
            total = row.total_steps or max(row.steps, 1)
            part = total if done else (row.steps if row.total_steps else 0)
            table.add_row(
                name,
                row.state,
                ProgressBar(total=total, completed=part, width=20),
                row.progress,
                "" if row.sps is None else short(row.sps),
                "" if row.return_ is None else f"{row.return_:.4g}",
                "" if row.score is None else f"{row.score:.2f}",
                row.workers or "",
                " ".join(f"{key}={_word(value)}" for key, value in row.extra.items()),
            )
        return table


def short(number: float) -> str:
    """Formats ``1234567`` as ``1.23M``: three digits and a suffix."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.9995:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.3g}"


def _word(value: object) -> str:
    """Formats a value without spaces, for lines of ``name=value name=value``."""
    return f"{value:.4g}" if isinstance(value, float) else "_".join(str(value).split())
