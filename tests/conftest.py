"""Every test runs offline, with a cache of its own; the models they share are built once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_OFFLINE = Path(__file__).parent / "offline"
sys.path[:0] = [str(Path(__file__).parent), str(_OFFLINE)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(_OFFLINE), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # several test processes: threads that wait for one another's cores are very slow
    os.environ["OMP_NUM_THREADS"] = "1"

import sitecustomize  # noqa: E402

sitecustomize._resolve  # noqa: B018  the guard, not some other module of that name

import pytest  # noqa: E402
import torch  # noqa: E402

from phinetune.exporting.build import build_onnx  # noqa: E402
from phinetune.lora import tiles  # noqa: E402
from phinetune.model import attention_tiles, kernels  # noqa: E402
from phinetune.training import head_tiles  # noqa: E402
from tiny import PROMPT, build_here, tiny_folder, tone_rows, write_rows  # noqa: E402

torch.set_num_threads(1)  # tiny products run faster on one thread, and two test runs do not get into each other's way


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache for this run; the embedded model, dear to unpack, is shared with the user's."""
    os.environ.setdefault("PHINETUNE_CACHE", str(tmp_path_factory.getbasetemp().parent / "phinetune-cache"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def phi3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "phi3", "phi3")


@pytest.fixture(params=["llama", "phi3"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


_BUILDS = ("phinetune.workflow.export.build_onnx", "phinetune.workflow.tune.build_onnx")


@pytest.fixture(scope="session", autouse=True)
def _builder_here() -> Iterator[None]:
    """The ONNX builder runs in this process: to start and import it takes ten seconds, and a hundred tests export. See `builder_started`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _BUILDS:
            patch.setattr(name, build_here)
        yield


@pytest.fixture
def builder_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX builder runs as it does for users, in a process of its own."""
    for name in _BUILDS:
        monkeypatch.setattr(name, build_onnx)


_PRODUCTS = [library for module in (tiles, attention_tiles, head_tiles) if (library := module.library()) is not None]
_IN_TILES = [kernels.TILES] if any(library.tiles_use(-1) == kernels.TILES for library in _PRODUCTS) else []


@pytest.fixture(scope="module", params=[*_IN_TILES, kernels.VECTORS], ids=lambda way: ("vectors", "tiles")[way - 1])
def each_way_of_multiplying(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled products in each of the two ways that this processor has; what has tiles has vectors as well."""
    before = [library.tiles_use(request.param) for library in _PRODUCTS]
    yield
    for library, way in zip(_PRODUCTS, before, strict=True):
        library.tiles_use(way)


@pytest.fixture
def tone_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "tone.jsonl", tone_rows())


@pytest.fixture
def tone_data(tone_file: Path) -> dict[str, object]:
    return {"path": str(tone_file), **PROMPT}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a given size, such as "4m"; skips where that is not possible."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
            pytest.skip("only root on Linux can mount a small disk")
        disk.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", disk], check=True)
