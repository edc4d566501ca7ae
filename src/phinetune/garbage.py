"""What lives already is not walked over while a long piece of work runs.

Python looks for reference cycles among all objects again and again, and torch and transformers have made about a million: a third of a
second each time, several times in a training run's first minutes, in which a processor's other threads wait. Not here: imports (`libraries.py`).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Inside, only what is made from now on is looked at for cycles (`gc.freeze`). Afterwards everything is as before: what was set aside
    already stays so, and nothing else does."""
    aside = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if aside:  # by the command line; what the work leaves behind must not be kept for good
            gc.collect()
            gc.freeze()
