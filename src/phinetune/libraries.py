"""Import large libraries at the pace of the import itself: no garbage is collected meanwhile.

torch and transformers make about a million objects that live as long as the process. While they come, Python's collector walks over
them again and again and finds nothing: a fifth of a start's time. Not here: when a library is needed; each function imports its own.
"""

from __future__ import annotations

import gc
import importlib
import sys

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
            importlib.import_module(module)
        _for_good |= for_good
        if _for_good:
            gc.freeze()
    finally:
        if collecting:
            gc.enable()
