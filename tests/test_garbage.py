"""What lives already is set aside while a long piece of work runs, and looked at again afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from phinetune.garbage import old_objects_left_alone


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_what_lived_before_is_looked_at_again_afterwards() -> None:
    assert gc.get_freeze_count() == 0
    old = Cycle()
    seen = weakref.ref(old)
    with old_objects_left_alone():
        del old
        gc.collect()
        assert seen() is not None and gc.get_freeze_count() > 0
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert seen() is None


def test_an_error_inside_changes_nothing_of_that() -> None:
    with pytest.raises(ZeroDivisionError), old_objects_left_alone():
        _ = 1 / 0
    assert gc.get_freeze_count() == 0


def test_what_a_program_had_set_aside_stays_so_and_the_works_own_cycles_do_not() -> None:
    code = (
        "import gc, weakref; from phinetune.garbage import old_objects_left_alone; gc.freeze(); a = gc.get_freeze_count()\n"
        "class C: pass\n"
        "with old_objects_left_alone():\n"
        "    c = C(); c.me = c; seen = weakref.ref(c)\n"
        "del c\n"
        "with old_objects_left_alone(): pass\n"
        "print(gc.get_freeze_count() > 0.9 * a > 0, seen() is None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
