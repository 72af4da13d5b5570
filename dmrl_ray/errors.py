"""Errors that a run can raise, each with the exit code of the command line.

0 success, 1 a fault of this package, 2 config, 3 folder in use, 4 storage, 5 environment,
6 cluster, 7 numerical. An environment that breaks its contract raises `types.EnvironmentFault`,
whose code is 5. What users can mend has a type of its own: any other error is shown as a fault of
this package.
"""

from __future__ import annotations

import unicodedata

FAULT = "this is a bug in dmrl_ray, unless the traceback ends in your code; please report it"


class DmrlError(Exception):
    """Base of all errors; the message is one sentence: where, what was found, what to do."""

    exit_code = 1


class ConfigError(DmrlError, ValueError):
    """The config, the command line or a file given by the user is invalid."""

    exit_code = 2


class IncompatibleSettings(ConfigError):
    """Settings that are valid one by one, but not together.

    Attributes:
        problems: (stage, message) pairs; stage is "" for the whole config, and a message begins
            with the setting.
    """

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("\n".join(f"stages.{s}: {text}" if s else text for s, text in problems))
        self.problems = problems


class FolderInUse(DmrlError):
    """Another process writes this run."""

    exit_code = 3


class StorageError(DmrlError, OSError):
    """A disk is full, read-only or broken; committed data are intact."""

    exit_code = 4


class CorruptRun(DmrlError):
    """No commit of a run is complete, or files differ from their commit."""

    exit_code = 4


class ClusterError(DmrlError):
    """The cluster lacks resources that the run needs, or was lost."""

    exit_code = 6


class JobLost(ClusterError):
    """A process died with a job's state; the job can continue from the newest commit."""


class NumericalError(DmrlError, ArithmeticError):
    """Losses, weights or actions became non-finite."""

    exit_code = 7


class Interrupted(DmrlError):
    """The run was stopped by a signal, after a commit."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class Abandoned(Interrupted):
    """The same, where what was done after the newest commit cannot be committed."""


def exit_code(error: BaseException) -> int:
    """Returns the exit code for an error that reached the command line."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, OSError):
        return StorageError.exit_code
    return ConfigError.exit_code if _is_missing_package(error) else DmrlError.exit_code


def sentence(error: BaseException) -> str | None:
    """Returns the message shown to the user; None for a bug, which is shown with its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if _is_missing_package(error):
        name = error.name  # type: ignore[attr-defined]
        return f"error: the package '{name}' is not installed; try: pip install {name}"
    if isinstance(error, ConfigError) and "\n" in str(error):
        return f"error: the config cannot be used\n{error}"
    if isinstance(error, DmrlError | OSError) or hasattr(error, "exit_code"):
        return f"error: {error}"
    return None


def _is_missing_package(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("dmrl_ray")


def printable(text: str) -> str:
    """Returns text of others as it can be shown: control characters are written as ``\\x1b``."""
    return "".join(c if c in "\n\t" or _is_shown(c) else _escaped(c) for c in text)


def _is_shown(character: str) -> bool:
    # Also surrogates, which cannot be written, and formats, which reverse the text after them.
    return (character.isascii() and character.isprintable()) or unicodedata.category(
        character
    ) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
