"""Importing large libraries: the collector is off meanwhile, on again after it, and frozen only for whoever begins with it."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from phinetune.libraries import import_libraries


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that nobody has imported and that notes whether the collector was on."""
    (tmp_path / "fresh_library.py").write_text("import gc\nCOLLECTING = gc.isenabled()\n")
    (tmp_path / "broken_library.py").write_text("raise ImportError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fresh_library", raising=False)
    return "fresh_library"


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_is_off_during_the_import_and_as_before_afterwards(module: str, collecting: bool) -> None:
    frozen = gc.get_freeze_count()
    if not collecting:
        gc.disable()
    try:
        import_libraries(module)
        assert not sys.modules[module].COLLECTING
        assert gc.isenabled() == collecting and gc.get_freeze_count() == frozen
    finally:
        gc.enable()


def test_a_failed_import_is_raised_and_leaves_the_collector_on(module: str) -> None:
    with pytest.raises(ImportError, match="broken"):
        import_libraries(module, "broken_library", for_good=True)
    assert gc.isenabled() and not gc.get_freeze_count()


def test_for_good_freezes_only_where_something_was_imported() -> None:
    code = (
        "import gc; from phinetune.libraries import import_libraries; import_libraries('gc', for_good=True); a = gc.get_freeze_count();"
        "import_libraries('csv', 'json.tool', for_good=True); b = gc.get_freeze_count();"
        "import_libraries('xml.dom.minidom'); print(a, 0 < b < gc.get_freeze_count(), gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "True"]
