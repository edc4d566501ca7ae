"""Importing large libraries: the collector is off meanwhile, on again after it, and frozen only for whoever begins with it."""

from __future__ import annotations

import gc
import os
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


def test_transformers_reads_its_models_once_and_has_the_same_names() -> None:
    code = """
import sys
from phinetune.libraries import import_libraries
import transformers
from transformers.utils import import_utils
read, own, made = [], import_utils.fetch__all__, import_utils.create_import_structure_from_path
import_utils.fetch__all__ = lambda content: read.append(1) or own(content)
if sys.argv[1] == "once":
    import_libraries("transformers.models.auto")
import transformers.models
assert import_utils.create_import_structure_from_path is made
print(len(read), len(dir(transformers.models)), hash(tuple(sorted(dir(transformers.models)))))
"""
    once, plain = (
        subprocess.run(
            [sys.executable, "-c", code, way],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        ).stdout.split()
        for way in ("once", "plain")
    )
    assert int(once[0]) < 100 and int(plain[0]) > 1000, "transformers keeps what it has read: _files_read_once may go"
    assert once[1:] == plain[1:] and int(once[1]) > 1000
