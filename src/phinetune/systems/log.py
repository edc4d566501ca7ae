"""The log of a run elsewhere: what it printed, as it comes, with secrets struck out.

A secret is a text under a name that ends in token, password, secret, key and the like, in the job or among the environment variables.
Not here: deciding what is printed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from phinetune.artifact import disk_errors

_SECRET = re.compile(
    r"(?:^|[^a-z])(?:token|password|passwd|passphrase|secret|key|apikey|credentials?|sas|connection_?string)$"
)
_SHORTEST = 8  # characters; shorter values under such a name are words ("</s>", "id"), and striking them out would spoil the log
_HIDDEN = "***"
_TAIL = 4096


def is_secret(name: str) -> bool:
    """True if what stands under `name` must not be shown: hf_token, apiKey, AZURE_STORAGE_KEY; not tokenizer or max_new_tokens."""
    return _SECRET.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")) is not None


def without_secrets(value: Any, name: str = "") -> Any:
    """`value` with every text and number under a secret name replaced by ***."""
    if isinstance(value, Mapping):
        return {k: without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v, name) for v in value]
    return _HIDDEN if is_secret(name) and not isinstance(value, bool | None) else value


def secrets_in(value: Any, name: str = "") -> list[str]:
    """The texts under secret names in nested `value`, long enough to be one."""
    if isinstance(value, Mapping):
        return [s for k, v in value.items() for s in secrets_in(v, str(k))]
    if isinstance(value, list | tuple):
        return [s for v in value for s in secrets_in(v, name)]
    return [value] if isinstance(value, str) and is_secret(name) and len(value) >= _SHORTEST else []


class LogFile:
    """A file that several streams are added to. Use as `with LogFile(...) as log`. Raises OutputError if it cannot be written."""

    def __init__(self, file: Path, secrets: Iterable[str] = ()) -> None:
        self.file = file.absolute()
        self.secrets = sorted({s.encode() for s in secrets}, key=len, reverse=True)
        self.last = b""
        self.failure: OSError | None = None
        with disk_errors(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.stream = self.file.open("ab", buffering=0)
        self.lock = threading.Lock()

    def add(self, data: bytes) -> None:
        """Write `data` at once; secrets are struck out where they lie wholly inside it.

        A disk that takes no more does not stop the reading, on which the other process waits; `failure` keeps the reason.
        """
        data = self.clean(data)
        with self.lock:
            self.last = (self.last + data)[-_TAIL:]
            rest = memoryview(data)
            try:
                while rest and self.failure is None and not self.stream.closed:
                    rest = rest[self.stream.write(rest) or 0 :]
            except OSError as error:
                self.failure = error

    def say(self, line: str) -> None:
        """Write one line of our own."""
        self.add(line.encode("utf-8", "replace") + b"\n")

    def copy(self, chunks: Iterable[bytes]) -> None:
        """Write `chunks` as they come. The beginning of a secret is held back until it is clear whether it is one."""
        held = b""
        for chunk in chunks:
            data = self.clean(held + chunk)
            kept = max((n for s in self.secrets for n in range(1, len(s)) if data.endswith(s[:n])), default=0)
            held = data[len(data) - kept :]
            self.add(data[: len(data) - kept])
        self.add(held)

    def clean(self, data: bytes) -> bytes:
        """`data` without secrets."""
        for secret in self.secrets:
            data = data.replace(secret, _HIDDEN.encode())
        return data

    def last_line(self) -> str:
        """The last line that says anything, or the empty string."""
        lines = [line.strip() for line in self.last.decode("utf-8", "replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.lock:
            self.stream.close()
