"""Import large libraries at the pace of the import itself: no garbage is collected meanwhile.

torch and transformers make about a million objects that live as long as the process. While they come, Python's collector walks over
them again and again and finds nothing: a fifth of a start's time. And transformers reads the names in all its model files, 2500 of them, twice:
once is enough. Not here: when a library is needed; each function imports its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_for_good = False  # whether this process began with for_good


def import_libraries(*modules: str, for_good: bool = False) -> None:
    """Import `modules` with the garbage collector off; it is as before afterwards. Nothing happens where all are imported already.

    for_good: what is alive then, and after each later call, is never walked over again in any collection (`gc.freeze`). That is for
    a program that begins with it, such as the command line: of a caller's objects, those in reference cycles would never be freed.
    """
    global _for_good
    if all(module in sys.modules for module in modules):
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        for module in modules:
            if module.split(".")[0] == "transformers":
                with _files_read_once(importlib.import_module("transformers")):
                    importlib.import_module(module)
            else:
                importlib.import_module(module)
        _for_good |= for_good
        if _for_good:
            gc.freeze()
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _files_read_once(transformers: Any) -> Iterator[None]:
    """Inside, `transformers.models` gets the names that `transformers` has found in its files already.

    Both ask `create_import_structure_from_path`, which keeps what it was asked last; but for 128 folders only, of 550, and the same folder by
    another name. Versions in which nothing of that kind is there are left alone.
    """
    names: Any = sys.modules.get("transformers.utils.import_utils")
    own: Any = getattr(names, "create_import_structure_from_path", None)
    if "transformers.models" in sys.modules or not hasattr(own, "cache_info") or not transformers.__file__:
        yield
        return
    models = Path(transformers.__file__).parent / "models"

    def known(path: Any) -> Any:
        return own(models if Path(path) == models / "__init__.py" else path)

    names.create_import_structure_from_path = known
    try:
        yield
    finally:
        names.create_import_structure_from_path = own
