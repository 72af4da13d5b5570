"""The display: cheap, readable by people and programs, and never the end of a run."""

import io
import subprocess
import sys
from contextlib import suppress

import pytest

from dmrl_ray.results.display import Display, short


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def plain(**arguments) -> tuple[Display, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return Display(stream=stream, clock=clock, **arguments), stream, clock


def test_a_line_can_be_parsed():
    display, stream, _ = plain()
    display.stage("meta", 5_000_000)
    display.update("meta", 1_600_000, 118_000, -7.7, 0.81, (2, 2), {"note": "two words"})
    assert stream.getvalue() == (
        "stage=meta steps=1.6M/5M sps=118k return=-7.7 score=0.81 workers=2/2 note=two_words\n"
    )


def test_figures_that_are_unknown_are_left_out():
    display, stream, _ = plain()
    display.update("meta", 10)
    assert stream.getvalue() == "stage=meta steps=10\n"


def test_lines_of_a_stage_come_no_closer_than_agreed():
    display, stream, clock = plain(every_s=5.0)
    for step in range(100):  # 0.2 s apart: 20 s, so lines at 0, 5, 10 and 15 s.
        display.update("meta", step)
        clock.now += 0.2
    assert len(stream.getvalue().splitlines()) == 4


def test_every_stage_has_lines_of_its_own():
    display, stream, _ = plain()
    display.update("a", 1)
    display.update("b", 2)
    assert stream.getvalue().splitlines() == ["stage=a steps=1", "stage=b steps=2"]


def test_the_end_of_a_stage_is_always_shown():
    display, stream, clock = plain()
    display.stage("meta", 100)
    display.update("meta", 50)
    display.update("meta", 100)
    clock.now += 2.0
    display.finish("meta")
    assert stream.getvalue().splitlines()[-1] == "stage=meta state=done steps=100/100 elapsed=2.0s"


def test_quiet_shows_nothing():
    stream = Terminal()
    with Display(quiet=True, stream=stream) as display:
        display.stage("meta", 10)
        display.update("meta", 5)
        display.message("hello")
        display.finish("meta")
    assert stream.getvalue() == ""


def test_an_output_that_fails_turns_the_display_off_with_one_line_in_the_log(caplog):
    with open("/dev/full", "w") as full, Display(stream=full, every_s=0.0) as display:
        for step in range(3):
            display.update("meta", step)
            display.message("still there")
        with suppress(OSError):
            full.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the display is off, as its output fails: [Errno 28] No space left on device"
    ]


def test_a_terminal_that_goes_away_in_a_live_table_does_not_end_the_run(caplog):
    class Closing(Terminal):
        gone = False

        def write(self, text):
            if self.gone:
                raise BrokenPipeError
            return super().write(text)

    stream = Closing()
    with Display(stream=stream) as display:
        display.stage("meta")
        stream.gone = True
        display.message("one")
        display.message("two")
        display.finish("meta")
    assert len(caplog.records) == 1


def test_a_closed_output_does_not_end_the_run():
    with Display(stream=Gone()) as display:
        display.update("meta", 5)
        display.message("hello")
        display.finish("meta")


def test_a_terminal_shows_a_table_with_a_row_per_stage(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Display(stream=stream) as display:
        display.stage("meta", 100)
        display.update("meta", 100, score=0.5)
        display.finish("meta")
        display.stage("tune")
        display.message("worker 1 lost [and replaced]")
    last = stream.getvalue().split("steps/s")[-1]
    assert "meta" in last
    assert "100/100" in last
    assert "0.50" in last
    assert "tune" in last
    assert "worker 1 lost [and replaced]" in stream.getvalue()


def test_a_terminal_is_drawn_at_most_four_times_a_second(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with Display(stream=stream, clock=clock) as display:
        before = stream.getvalue().count("steps/s")
        for step in range(1000):
            display.update("meta", step)
        assert stream.getvalue().count("steps/s") - before == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999.9, "1k"), (118_000, "118k"), (1_600_000, "1.6M"), (5e9, "5G")],
)
def test_numbers_are_short(number, text):
    assert short(number) == text


def test_the_display_imports_nothing_heavy():
    code = "import sys, dmrl_ray.results.display; print(*sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert {"rich", "ray", "torch", "numpy"}.isdisjoint(answer.stdout.split())
