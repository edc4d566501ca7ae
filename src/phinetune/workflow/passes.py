"""What a pass is, and the table of them: a function and a config dataclass, nothing more.

    PASSES = {"Prune": Pass(prune, PruneConfig, takes=("hf",), gives="hf")}

`prune(job, folder)` reads `job.input` and writes an artifact's files into `folder`; the workflow names the folder, caches it by content,
and puts it in place whole. A third party adds passes by the entry-point group `phinetune.passes` (each entry a `Pass`), or by a
`user_script` that holds such a table. Not here: phinetune's own passes (`stages.py`), running them (`run.py`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from phinetune.artifact import content_key, file_hash
from phinetune.config import parse
from phinetune.data.messages import DataConfig
from phinetune.errors import ConfigError, did_you_mean, first_line
from phinetune.events import OnEvent, log_event
from phinetune.systems.config import AcceleratorConfig
from phinetune.workflow.config import PassEntry

GROUP = "phinetune.passes"
NO_SPACE = ("data", "eval_data", "user_script")
"""Keys of a pass that cannot be searched over."""


@dataclass(frozen=True)
class PassJob:
    """What a pass is given: its config, its input artifact, the workflow's data, and where to leave the result."""

    config: Any
    input: str
    """Folder of the artifact, or the name of the base model that goes into the first pass."""
    output: Path
    """Where the finished artifact will be."""
    model_kwargs: dict[str, Any]
    data: dict[str, DataConfig]
    seed: int | None = None
    on_event: OnEvent = log_event


@dataclass(frozen=True)
class Pass:
    """A pass: `run(job, folder)` fills `folder`, and may return figures for the artifact's manifest."""

    run: Callable[[PassJob, Path], dict[str, Any] | None]
    config: type
    """A frozen dataclass: the pass's keys, their types and defaults."""
    takes: tuple[str, ...]
    """Kinds of artifact it can begin with: hf, adapter, onnx."""
    gives: str
    """Kind of artifact it leaves."""
    version: int = 1
    """Raised when the same input gives another output: what is cached is made again then."""
    whole: bool = False
    """`run` puts the finished folder at `job.output` itself, manifest and all; `folder` is `job.output` then."""
    data: tuple[str, ...] = ()
    """Keys that name data configs; the first one is what it trains on."""
    files: tuple[str, ...] = ()
    """Keys that name files: their content belongs to the cache key."""
    gather: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Puts flat keys into groups before the config is read."""
    known: tuple[str, ...] = ()
    """Flat keys that `gather` knows, for "did you mean"."""
    check: Callable[[PassJob], None] | None = None
    """Raises a PhinetuneError, before any work begins, for what reading the config alone does not show."""
    for_target: Callable[[AcceleratorConfig], dict[str, Any]] | None = None
    """Values of keys that follow from what the result is for; given ones win. Raises ConfigError if the pass cannot serve it."""

    def __post_init__(self) -> None:
        if not callable(self.run) or not dataclasses.is_dataclass(self.config) or not isinstance(self.config, type):
            raise TypeError("a Pass needs a function, and a dataclass that says its keys")
        if isinstance(self.takes, str) or not self.takes:
            raise TypeError('a Pass needs a tuple of the kinds that it takes, such as ("hf",)')


def pass_table() -> dict[str, Pass]:
    """Every pass by name: phinetune's own, and those that installed packages add.

    Names are the same in any case; a package cannot replace a pass of ours or of another one. Raises one ConfigError with every entry
    point that is not right.
    """
    from phinetune.workflow.stages import PASSES

    table, problems = dict(PASSES), []
    owners = {name.lower(): "phinetune" for name in PASSES}
    for entry in metadata.entry_points(group=GROUP):
        if owner := owners.get(entry.name.lower()):
            whose = "phinetune's own" if owner == "phinetune" else f"added by {owner} already"
            problems.append(f"{entry.value}: adds a pass called {entry.name}, which is {whose}")
            continue
        owners[entry.name.lower()] = entry.value
        try:
            loaded = entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit as well
            problems.append(f"the pass {entry.name} of {entry.value} cannot be loaded: {_reason(error)}")
            continue
        if isinstance(loaded, Pass):
            table[entry.name] = loaded
        else:
            problems.append(f"{entry.value}: must be a phinetune.Pass (found: {type(loaded).__name__})")
    if problems:
        raise ConfigError(problems, "uninstall or mend the package")
    return table


def find_pass(entry: PassEntry, table: dict[str, Pass]) -> Pass:
    """The pass of `entry`, by its type in any case. Raises ConfigError with the nearest name, or if its `user_script` fails."""
    if entry.user_script:
        table = {**table, **script_passes(entry.user_script, f"{entry.path}.user_script")}
    by_name = {name.lower(): name for name in table}
    name = by_name.get(entry.type.lower())
    if name is None:
        from phinetune.workflow.stages import REFUSED

        why = {n.lower(): text for n, text in REFUSED.items()}.get(entry.type.lower())
        raise ConfigError(
            f"{entry.path}.type: no pass is called {entry.type!r}{': ' + why if why else did_you_mean(entry.type, table)}",
            f"the passes are {', '.join(table)}",
        )
    return table[name]


def script_passes(script: str, path: str) -> dict[str, Pass]:
    """The `PASSES` of a user's script. Raises ConfigError if it is not there, fails to import, or holds none."""
    file = Path(script).expanduser()
    if not file.is_file():
        raise ConfigError(f"{path}: {script}: no such file")
    try:
        name = f"phinetune_user_script_{content_key(str(file.resolve()), file_hash(file))[:12]}"
    except OSError as error:
        raise ConfigError(f"{path}: {script}: cannot be read: {error.strerror}") from None
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{path}: {script}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            sys.modules.pop(name, None)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ConfigError(f"{path}: {script} fails to import: {_reason(error)}") from error
    passes = getattr(sys.modules[name], "PASSES", None)
    if not isinstance(passes, dict) or not passes or not all(isinstance(p, Pass) for p in passes.values()):
        raise ConfigError(f"{path}: {script}: must define PASSES, a dictionary of names and phinetune.Pass")
    return passes


def parse_pass(entry: PassEntry, pass_: Pass, values: dict[str, Any], target: AcceleratorConfig | None = None) -> Any:
    """The config object of a pass from its keys, spaces filled. Raises ConfigError with every unknown key and wrong value."""
    fields = [f.name for f in dataclasses.fields(pass_.config) if f.init]
    unknown = [key for key in values if key not in fields and key not in pass_.known]
    problems = [f"{entry.path}.{key}: unknown key{did_you_mean(key, [*fields, *pass_.known])}" for key in unknown]
    values = {key: value for key, value in values.items() if key not in unknown}
    config: Any = None
    try:
        if pass_.for_target and target:
            values = {**_under(entry.path, pass_.for_target, target), **values}
        if pass_.gather:
            values = _under(entry.path, pass_.gather, values)
        config = parse(pass_.config, values, entry.path)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config


def _under(path: str, function: Callable[[Any], dict[str, Any]], argument: Any) -> dict[str, Any]:
    """`function` of `argument`; the problems of its ConfigError begin with `path`."""
    try:
        return function(argument)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


def _reason(error: BaseException) -> str:
    text = first_line(error)
    return text if type(error).__name__ in text else f"{type(error).__name__}: {text}"
