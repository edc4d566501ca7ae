"""Leave secrets out of what a run writes down: tokens, passwords, keys, and passwords inside URLs.

What counts as one is read from the key's name; a yes or no (`use_auth_token: true`) is none. Not here: what the stages write into
their manifests, which leave their secrets out themselves.
"""

from __future__ import annotations

import re
from typing import Any

_PARTS = (
    "password",
    "passwd",
    "secret",
    "api_key",
    "apikey",
    "access_key",
    "account_key",
    "credential",
    "connection_string",
)
_WORDS_OF_TEXT = ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "stop")
_URL_PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):[^@/\s]+@")


def is_secret(key: str) -> bool:
    """True for the name of a key whose text must not be written down; `eos_token` and its like are words of a vocabulary."""
    name = key.lower().replace("-", "_")
    if name == "token" or name.endswith("_token"):
        return name.removesuffix("_token") not in _WORDS_OF_TEXT
    return any(part in name for part in _PARTS)


def without_secrets(value: Any, path: str = "", left_out: list[str] | None = None) -> Any:
    """A copy of nested dictionaries and lists without secret keys and without passwords in URLs; their paths go to `left_out`."""
    left_out = [] if left_out is None else left_out
    if isinstance(value, dict):
        kept = {}
        for key, inner in value.items():
            where = f"{path}.{key}" if path else str(key)
            if is_secret(str(key)) and inner is not None and not isinstance(inner, bool):
                left_out.append(where)
            else:
                kept[key] = without_secrets(inner, where, left_out)
        return kept
    if isinstance(value, list | tuple):
        return [without_secrets(inner, f"{path}[{i}]", left_out) for i, inner in enumerate(value)]
    if isinstance(value, str) and _URL_PASSWORD.search(value):
        left_out.append(path)
        return _URL_PASSWORD.sub(r"\1@", value)
    return value
