"""Every error phinetune raises on purpose. The message reaches the user as it stands: one line, in the words of their own files.

    PhinetuneError            exit code 2: the user can mend it
    ├── ConfigError           a key, a value or an option
    ├── DataError             a data file or its rows
    ├── ModelError            a base model, its folder or its tokenizer
    ├── AdapterError          an adapter, its target modules, or the base it belongs to
    ├── TrainingError         nothing to learn in a batch, or a loss that is not finite
    ├── OutputError           the output folder: occupied, not writable, disk full
    ├── ExportError           an ONNX build, or its verification
    ├── PassError             a pass of a workflow that failed by a bug, its own or ours (exit code 1)
    ├── InfeasibleError       no trial meets every constraint (exit code 3)
    ├── SystemRunError        another Python environment or a container: not to be reached, or what broke down in it
    └── MissingPackageError   a package that an extra installs

Anything else that escapes is a bug: it keeps its traceback and ends with exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PhinetuneError(Exception):
    """Base of the tree. `problems` holds one or more one-line texts, `hint` says what to do about them."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str], hint: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.problems[0] if len(self.problems) == 1 else "\n".join(f"- {p}" for p in self.problems)
        return f"{text}\nhint: {self.hint}" if self.hint else text


class ConfigError(PhinetuneError):
    """An unknown key, a wrong value, an option that cannot be."""


class DataError(PhinetuneError):
    """A data file that is missing, broken or empty, or rows that cannot be used."""


class ModelError(PhinetuneError):
    """A base model that is not there, not complete, or not one that can be loaded."""


class AdapterError(PhinetuneError):
    """Target modules that match nothing, an adapter file that does not fit, an adapter for another base model."""


class TrainingError(PhinetuneError):
    """A batch without a learned token, or a run that diverged."""


class OutputError(PhinetuneError):
    """The output folder holds something else, cannot be written, or the disk is full."""


class ExportError(PhinetuneError):
    """The ONNX builder failed, or what it built is not what was asked for."""


class PassError(PhinetuneError):
    """A pass failed by a bug; its traceback is in the run's log."""

    exit_code = 1


class InfeasibleError(PhinetuneError):
    """Nothing that was tried meets every constraint; the problems are the nearest misses."""

    exit_code = 3


class SystemRunError(PhinetuneError):
    """A process or container that cannot be started, or that ended without handing over a result; the message names its log."""


class MissingPackageError(PhinetuneError):
    """A package that only an extra installs is needed for what was asked."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean "x"?` for the nearest known word, or the empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f', did you mean "{near[0]}"?' if near else ""


def first_line(error: BaseException) -> str:
    """What a foreign exception says, in one line; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
