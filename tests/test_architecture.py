"""The frame: layers import to the left only, nothing below the command line prints, imports stay cheap, names are what they say."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import phinetune

SOURCE = Path(phinetune.__file__).parent
LAYERS = (
    "errors", "events", "config", "artifact", "quiet", "libraries", "garbage", "data", "model", "lora", "training", "generation", "evaluation", "exporting", "serving", "systems",
    "workflow", "olive", "cli",
)  # fmt: skip
FILES = sorted(SOURCE.rglob("*.py"))
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
LIBRARIES_OF_LORA = {"torch", "safetensors"}


def layer(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Full names of the modules that `file` imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent != SOURCE or f.stem in LAYERS], ids=lambda f: str(f.relative_to(SOURCE))
)
def test_a_file_imports_from_its_own_layer_and_the_ones_before(file: Path) -> None:
    own = layer(file)
    reached = {name.split(".")[1] for name in imports(file) if name.startswith("phinetune.")}
    assert own in LAYERS and reached <= set(LAYERS[: LAYERS.index(own) + 1]), f"{own} must not import {reached}"


def test_lora_needs_torch_and_safetensors_only() -> None:
    outside = {name.split(".")[0] for file in (SOURCE / "lora").glob("*.py") for name in imports(file)} - set(
        sys.stdlib_module_names
    )
    assert outside - {"phinetune"} <= LIBRARIES_OF_LORA


def test_the_product_never_imports_its_peers() -> None:
    assert not {name.split(".")[0] for file in FILES for name in imports(file)} & {
        "peft",
        "trl",
        "loralib",
        "requests",
        "httpx",
    }


@pytest.mark.parametrize(
    "file", [f for f in FILES if layer(f) not in ("cli", "__main__")], ids=lambda f: str(f.relative_to(SOURCE))
)
def test_nothing_below_the_command_line_prints_or_exits(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("print", "input", "exit", "quit", "sys.exit", "sys.stdout.write", "sys.stderr.write"), (
                f"line {node.lineno}: {name}"
            )


def test_files_say_what_they_are_and_stay_small() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{file} has no docstring"
        assert len(text.splitlines()) <= 400, f"{file} is too long"
        assert file.stem not in FORBIDDEN_NAMES


def test_functions_stay_small() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 100, f"{file}:{node.lineno}: {node.name}"


def test_public_names_are_what_is_importable() -> None:
    assert phinetune.__all__ == sorted(phinetune.__all__)
    for name in phinetune.__all__:
        value = getattr(phinetune, name)
        assert not isinstance(value, types.ModuleType), f"phinetune.{name} is a module"
        assert name == "__version__" or inspect.getdoc(value), f"phinetune.{name} has no docstring"


def test_public_functions_survive_the_import_of_every_module() -> None:
    for file in FILES:
        if file.stem != "__main__":
            importlib.import_module(
                "phinetune." + ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
                if file != SOURCE / "__init__.py"
                else "phinetune"
            )
    assert (
        callable(phinetune.finetune)
        and callable(phinetune.evaluate)
        and callable(phinetune.export)
        and callable(phinetune.merge)
    )


def test_public_classes_and_functions_are_documented() -> None:
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and node.name != "root"
            ):
                assert ast.get_docstring(node), f"{file}:{node.lineno}: {node.name} has no docstring"


def test_importing_the_package_is_cheap() -> None:
    code = "import phinetune, sys; sys.exit(str({'torch', 'transformers', 'pydantic', 'typer'} & set(sys.modules) or '') or 0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nothing_is_done_at_import() -> None:
    """No environment variable is set and no setting of a library is changed by importing any module."""
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            text = ast.unparse(node)
            assert "os.environ[" not in text.partition("def ")[0], f"{file}:{node.lineno}"


def test_few_frames_of_ours_lie_between_the_command_and_the_model(
    llama_folder: Path, tone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phinetune.cli.app import main
    from phinetune.training import loss

    original = loss.head_only_at
    seen: list[list[str]] = []

    def spy(head: object, positions: object) -> object:
        frames = inspect.stack()[1:]
        seen.append([f.function for f in frames if str(SOURCE) in f.filename])
        return original(head, positions)  # type: ignore[arg-type]

    monkeypatch.setattr(loss, "head_only_at", spy)
    args = [
        "finetune",
        "-m",
        str(llama_folder),
        "-d",
        str(tone_file),
        "--prompt",
        "{phrase}",
        "--completion",
        "{tone}",
        "-o",
        str(tmp_path / "o"),
        "-q",
    ]
    assert main([*args, "-s", "training_config.max_steps=1"]) == 0
    trained = next(frames for frames in seen if "fit" in frames)  # the forecast runs the loss before, without numbers
    assert trained[::-1] == ["main", "finetune", "finetune", "fit", "compute_loss", "supervised_loss"]
