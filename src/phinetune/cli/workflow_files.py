"""The commands around workflow files: `init` writes a first one, `schema` what editors check them by, `cache` shows and clears what runs keep."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from phinetune.workflow.store import Store, StoredArtifact

cache = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What workflow runs keep: list it, remove it.")

CacheDir = Annotated[
    str | None,
    typer.Option(
        help="The cache's folder (default: the one that workflows use without cache_dir).", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command()(init)
    app.command()(schema)
    app.add_typer(cache, name="cache")


def init(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model folder, hub id (owner/name) or embedded model (smollm2-135m).")
    ],
    data: Annotated[str, typer.Option("--data", "-d", help="Data file, or bundled set (tone).")],
    prompt: Annotated[
        str | None, typer.Option(help='Column template of the question, such as "Tone? {phrase}".', show_default=False)
    ] = None,
    completion: Annotated[
        str | None, typer.Option(help='Column template of the answer, such as "{tone}".', show_default=False)
    ] = None,
    goal: Annotated[
        Literal["int4", "model", "adapter"],
        typer.Option(help="What it ends with: a 4-bit ONNX model, a merged model, or the adapter."),
    ] = "int4",
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "phinetune.yaml",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a first workflow file for a model and a data file.

    Its comments say what each key means. The data's first rows are looked at for the templates of question and answer.
    """
    from phinetune.cli.console import out
    from phinetune.errors import OutputError
    from phinetune.workflow.starter import starting_file

    file = Path(output).expanduser()
    if file.exists() and not overwrite:
        raise OutputError(f"{file}: is there already", "choose another name with --output, or pass --overwrite")
    text = starting_file(model, data, prompt, completion, goal)
    _write(file, text)
    if "# GUESSED" in text:
        typer.echo(f"the templates of question and answer are guessed: look at data in {file}", err=True)
    out().print(f"{file} written. Run it with: phinetune run {file}", markup=False)


def schema(
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File to write (default: standard output).", show_default=False)
    ] = None,
) -> None:
    """Print the JSON Schema of workflow files, for completion and checks in editors.

    It holds the passes that are installed here.
    """
    from phinetune.workflow.schema import workflow_schema

    text = json.dumps(workflow_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        _write(Path(output).expanduser(), text)


@cache.command()
def ls(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """List what is kept, the last used first."""
    store = _store(cache_dir)
    _show(store.entries(), as_json, str(store.folder), "kept in")


@cache.command()
def rm(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys, or how they begin, as ls shows them.")],
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Remove artifacts by key. They are made again when a run needs them."""
    store = _store(cache_dir)
    _show(store.remove(keys), as_json, str(store.folder), "removed from")


@cache.command()
def gc(
    max_size: Annotated[str, typer.Option(help="Most that is kept, such as 10GB or 500MiB.")],
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Remove what was used longest ago until the rest fits --max-size."""
    size = parse_size(max_size, "--max-size")
    store = _store(cache_dir)
    _show(store.collect(size), as_json, str(store.folder), "removed from")


def parse_size(text: str, option: str) -> int:
    """Bytes of "10GB", "1.5 GiB" or "4096". Raises ConfigError naming `option`."""
    from phinetune.errors import ConfigError

    found = _SIZE.fullmatch(text)
    unit = (found[2].lower() or "b") if found else ""
    if not found or unit not in _UNITS:
        raise ConfigError(f"{option}: not a size: {text!r}", "write 500MB, 10GB, 1.5GiB, or bytes")
    return int(float(found[1]) * _UNITS[unit])


def _store(cache_dir: str | None) -> Store:
    """The cache. Raises ConfigError for a folder that is none, so that a typo makes no new one."""
    from phinetune.errors import ConfigError
    from phinetune.workflow.store import Store

    folder = Path(cache_dir).expanduser() if cache_dir else None
    if folder is not None and not (folder / "artifacts").is_dir():
        raise ConfigError(f"--cache-dir {cache_dir}: holds no cache of workflow runs")
    return Store(folder)


def _show(entries: list[StoredArtifact], as_json: bool, folder: str, done: str) -> None:
    """The entries as a table with their sum, or as JSON."""
    from phinetune.cli.console import out
    from phinetune.evaluation.columns import size_text

    total = sum(e.size_bytes for e in entries)
    if as_json:
        value: dict[str, Any] = {"folder": folder, "artifacts": [asdict(e) for e in entries], "size_bytes": total}
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    console = out()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in ("key", "pass", "kind", "size", "last used", "state"):
        table.add_column(name, justify="right" if name == "size" else "left", no_wrap=True)
    for e in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used))
        state = "finished" if e.finished else "unfinished"
        table.add_row(e.key.removesuffix(".partial")[:12], e.made_by, e.kind, size_text(e.size_bytes), used, state)
    if entries:
        console.print(table)
    count = "1 artifact" if len(entries) == 1 else f"{len(entries)} artifacts"
    console.print(f"{count}, {size_text(total)}, {done} {folder}", markup=False, soft_wrap=True)


def _write(file: Path, text: str) -> None:
    """Write `text` whole or not at all, making the folder if need be."""
    import os

    from phinetune.artifact import disk_errors
    from phinetune.errors import OutputError

    if file.is_dir():
        raise OutputError(f"{file}: is a folder", "name a file with --output")
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
