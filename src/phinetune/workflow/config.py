"""`WorkflowConfig`: one file that says model, data, passes, metrics, goals and systems, and what each key means.

    model: smollm2-135m
    data: {path: phrases.jsonl, prompt: "What is the tone of this phrase? {phrase}", completion: "{tone}"}
    passes:
      lora:  {type: LoRA, r: {choices: [8, 16, 32]}, training_config: {num_train_epochs: 3}}
      merge: {type: MergeAdapterWeights}
      int4:  {type: ModelBuilder, block_size: {choices: [32, 128]}}
    evaluate: {metrics: [exact_match, size]}
    constraints: [exact_match >= 0.92, size <= 90 MB]
    objectives: [min latency_p50]
    search: {trials: 12}
    output_dir: tone

The dataclasses hold what is the same for every workflow; a pass's own keys are checked by the pass (`passes.py`). Not here: Olive's
files, which are translated into this form at the edge (`phinetune.olive`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from phinetune.config import STRICT, apply_settings, locate, parse, read_config_text
from phinetune.data.messages import DataConfig, parse_data_config
from phinetune.data.records import BUNDLED
from phinetune.errors import ConfigError, did_you_mean
from phinetune.systems.config import SystemConfig

ONLY = "default"
"""The name of a data config that was given without one."""
RESERVED = ("type", "host", "evaluate", "user_script")
"""Keys of a pass entry that are the workflow's, not the pass's."""


@dataclass(frozen=True)
class ModelConfig:
    """The base model that goes in."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    path: str
    """Model folder, hub id (owner/name), embedded model (smollm2-135m), or a folder that finetune, merge or export wrote."""
    adapter: str | None = None
    """Adapter folder over that model; the first pass gets the adapter then."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Names of from_pretrained: torch_dtype, attn_implementation, device_map, trust_remote_code, revision, ..."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and on which examples. Metrics that constraints and objectives name are added."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    metrics: list[str] = field(default_factory=lambda: ["exact_match"])
    """Names of metrics and measurements: exact_match, stop_rate, perplexity, latency_p50, throughput, size, memory, ..."""
    data: str | None = None
    """Name of the data config that is scored; default: the one that the training pass uses."""
    split: Literal["test", "train", "all"] | None = None
    """Which of its examples; default: the held-out ones of data that was trained on, all of other data."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; default: half as much again as the longest reference."""
    max_examples: int | None = None
    """Score this many examples only, the first ones."""
    warmup: int = 3
    """Answers before a clock is read."""
    repeats: int = 20
    """Answers that are timed."""
    input_model: bool = True
    """Score the model that goes in, too. Always done where a goal is relative to it."""
    every_pass: bool = False
    """Score what each pass leaves, not the last one's only."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_examples", "repeats"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.warmup < 0:
            raise ValueError("warmup must be at least 0")


@dataclass(frozen=True)
class SearchConfig:
    """How the spaces in the passes are searched."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    sampler: Literal["tpe", "random", "exhaustive", "nsga2"] = "tpe"
    """How trials are proposed: tpe (Bergstra et al. 2011), random, exhaustive (every combination), nsga2 (Deb et al. 2002)."""
    trials: int | None = None
    """Trials at most; default: 20, or every combination where sampler is exhaustive."""
    minutes: float | None = None
    """No new trial begins after this many minutes."""
    order: Literal["joint", "pass-by-pass"] = "joint"
    """joint: all parameters together. pass-by-pass: those of the first pass, then with its best values those of the next."""
    seed: int = 0
    """Seed of the sampler."""
    pruner: Literal["none", "median", "halving"] = "median"
    """Stops a training whose held-out loss is behind: median (worse than the median trial's), halving (successive halving)."""
    truncate_rank: bool = False
    """Try ranks by truncating one adapter of the highest rank (SVD); only the winner's rank is trained itself."""
    stop_when_met: bool = False
    """End with the first trial that meets every constraint."""
    storage: str | None = None
    """Database URL of the study, for several workers on several machines; default: a file in the cache."""
    study: str | None = None
    """Name of the study in that storage; default: made from the workflow's content."""
    workers: int = 1
    """Worker processes on this machine."""

    def __post_init__(self) -> None:
        for name in ("trials", "minutes", "workers"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")


@dataclass(frozen=True)
class PackageConfig:
    """A zip file of the chosen model, ready to hand on."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str = "model"
    """Name of the zip file in the output folder, without its ending."""
    sample_code: bool = True
    """Put a program that loads the model and answers a prompt into it."""

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError("name must be the name of a file, without folders")


@dataclass(frozen=True)
class PassEntry:
    """One pass of the file, or one of several alternatives: its type, where it runs, and its own keys, spaces still in them."""

    name: str
    type: str
    host: str | None
    evaluate: bool | None
    user_script: str | None
    values: dict[str, Any]
    path: str
    """Where it stands in the file: passes.lora, or passes.quantize[1] for an alternative."""


@dataclass(frozen=True)
class WorkflowConfig:
    """The whole file."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    model: ModelConfig
    """Folder, hub id or embedded name of the base model; or path, adapter and model_kwargs."""
    passes: dict[str, Any]
    """Name -> type and keys of a pass, in the order they run; a list of them stands for alternatives to search over."""
    data: dict[str, DataConfig] = field(default_factory=dict)
    """One data config, or name -> data config; or just a file."""
    evaluate: EvaluateConfig | None = None
    """What is measured of the result."""
    constraints: list[str] = field(default_factory=list)
    """What must hold, such as "exact_match >= 0.92", "size <= 90 MB", "latency_p50 <= base * 0.8", "perplexity <= base + 5 %"."""
    objectives: list[str] = field(default_factory=list)
    """What to improve, the most important first, such as "min latency_p50", "max exact_match"."""
    search: SearchConfig | None = None
    """How spaces and alternatives are searched; needed if there are any."""
    systems: dict[str, SystemConfig] = field(default_factory=dict)
    """Name -> a place where passes run: this process (local), another Python environment, a Docker image."""
    host: str | None = None
    """Name of the system where passes run; default: this process."""
    target: str | None = None
    """Name of the system that the result is for; its accelerator is the default of passes that build for one."""
    seed: int | None = None
    """Seed of every training whose training_config does not say its own."""
    output_dir: str = "phinetune-run"
    """Folder for the chosen model, results.json, footprint.json and the log."""
    cache_dir: str | None = None
    """Folder of finished passes, by content; default: in $PHINETUNE_CACHE or the user's cache folder."""
    package: PackageConfig | None = None
    """Also pack the chosen model into a zip file."""


KEYS = tuple(WorkflowConfig.__dataclass_fields__)


def read_workflow(file: str | Path, settings: Sequence[str] = ()) -> tuple[WorkflowConfig, list[PassEntry]]:
    """The workflow in a native YAML or JSON file, `settings` applied; see `parse_workflow`. Problems name the file's lines."""
    path = Path(file)
    text, values = read_config_text(path)
    try:
        return parse_workflow(apply_settings(values, settings), path.absolute().parent)
    except ConfigError as error:
        raise locate(error, text, path) from None


def parse_workflow(values: dict[str, Any], folder: Path | None = None) -> tuple[WorkflowConfig, list[PassEntry]]:
    """(config, entries of the passes) of native values; data files that are not here are looked for in `folder`. Raises one ConfigError with every problem.

    Checked here: keys, types, references between the parts. Checked by the plan: what a pass says of its own keys, files, order; what it
    finds in the parts that are right is raised with the problems found here.
    """
    values = {key: value for key, value in values.items() if key != "$schema"}
    problems: list[str] = [f"{key}: unknown key{did_you_mean(key, KEYS)}" for key in values if key not in KEYS]
    values = {key: value for key, value in values.items() if key in KEYS}
    if "model" in values and isinstance(values["model"], str):
        values["model"] = {"path": values["model"]}
    data = _data(values.pop("data", None), folder, problems)
    entries = _entries(values.get("passes"), folder, problems)
    values["passes"] = _with_scripts(values.get("passes"), folder)
    values["data"] = data
    config = None
    try:
        config = parse(WorkflowConfig, values)
    except ConfigError as error:
        problems += error.problems
    problems += _dangling(values, entries)
    if config is None or problems:
        from phinetune.workflow.plan import other_problems

        whole = len(entries) == sum(len(v) if isinstance(v, list) else 1 for v in values["passes"].values())
        problems += other_problems(config or _readable(values), entries, whole)
        raise ConfigError(list(dict.fromkeys(problems)))
    return config, entries


def _readable(values: dict[str, Any]) -> WorkflowConfig:
    """The parts of a file that are right, and something that has no problems in place of the others."""
    kept: dict[str, Any] = {"model": {"path": ""}, "passes": {}}
    others = {"search": {"trials": 1}, "constraints": ["size >= 0"]}
    for key, value in values.items():
        if key != "passes":
            with contextlib.suppress(ConfigError):
                parse(WorkflowConfig, {**kept, key: value})
                kept[key] = value
            if key not in kept and key in others:
                kept[key] = others[key]
    return parse(WorkflowConfig, kept)


def as_values(config: WorkflowConfig) -> dict[str, Any]:
    """`config` as plain values that `parse_workflow` reads as the same workflow."""
    values = {key: value for key, value in asdict(config).items() if value is not None}
    values["data"] = {n: {k: v for k, v in data.items() if v is not None} for n, data in values["data"].items()}
    return values


def _data(given: Any, folder: Path | None, problems: list[str]) -> dict[str, DataConfig]:
    """Name -> DataConfig from a file name, one config's fields, or several configs by name."""
    if given is None:
        return {}
    if isinstance(given, str) or (isinstance(given, dict) and isinstance(given.get("path"), str)):
        named, prefix = {ONLY: given}, {ONLY: "data"}
    elif isinstance(given, dict):
        named, prefix = given, {name: f"data.{name}" for name in given}
        if given and not any(isinstance(v, dict) for v in given.values()):
            fields = DataConfig.__dataclass_fields__
            if not all(isinstance(v, str) for v in given.values()) or set(given) & set(fields):
                named, prefix = {ONLY: given}, {ONLY: "data"}  # one config without its path, not names and files
    else:
        problems.append(f"data: must be a file, a data config, or names and data configs (found: {given!r})")
        return {}
    configs = {}
    for name, value in named.items():
        try:
            values = {"path": value} if isinstance(value, str) else value
            if isinstance(values, dict) and isinstance(values.get("path"), str) and folder is not None:
                values = {**values, "path": from_folder(values["path"], folder)}
            configs[name] = parse_data_config(values)
        except ConfigError as error:
            problems += [prefix[name] + problem.removeprefix("data") for problem in error.problems]
            configs[name] = DataConfig(next(iter(BUNDLED)))  # stands for it while the rest is checked
    return configs


def from_folder(path: str, folder: Path) -> str:
    """`path`, or where it is in the workflow file's `folder` if it is not in the current one; bundled sets and hub ids stay as they are."""
    local = folder / path
    if path in BUNDLED:
        return path
    return str(local) if not Path(path).expanduser().exists() and local.exists() else path


def _entries(given: Any, folder: Path | None, problems: list[str]) -> list[PassEntry]:
    """The pass entries in order; alternatives of one pass have its name."""
    if not isinstance(given, dict) or not given:
        problems.append(
            "passes: this key is needed: names and passes, such as lora: {type: LoRA}"
            if not given
            else f"passes: must be names and passes (found: {given!r})"
        )
        return []
    entries = []
    for name, value in given.items():
        if not re.fullmatch(r"[\w -]+", name):
            problems.append(f"passes: {name!r} cannot be the name of a pass; use letters, digits, _ and -")
        if isinstance(value, list) and not value:
            problems.append(f"passes.{name}: an empty list of alternatives")
        for index, one in enumerate(value if isinstance(value, list) else [value]):
            path = f"passes.{name}[{index}]" if isinstance(value, list) else f"passes.{name}"
            one = {} if one is None else one
            if not isinstance(one, dict):
                problems.append(f"{path}: must be a pass's type and keys (found: {one!r})")
                continue
            wrong = [
                f"{path}.{key}: must be {'a name' if kind is str else 'true or false'} (found: {one[key]!r})"
                for key, kind in (("type", str), ("host", str), ("evaluate", bool), ("user_script", str))
                if one.get(key) is not None and not isinstance(one[key], kind)
            ]
            if wrong:
                problems += wrong
                continue
            own = {key: v for key, v in one.items() if key not in RESERVED}
            script = one.get("user_script")
            script = from_folder(script, folder) if isinstance(script, str) and folder is not None else script
            entries.append(
                PassEntry(name, str(one.get("type") or name), one.get("host"), one.get("evaluate"), script, own, path)
            )
    return entries


def _with_scripts(given: Any, folder: Path | None) -> dict[str, Any]:
    """The passes as they were given, user scripts found in the file's folder."""

    def placed(one: Any) -> Any:
        if folder is None or not isinstance(one, dict) or not isinstance(one.get("user_script"), str):
            return one
        return {**one, "user_script": from_folder(one["user_script"], folder)}

    passes = given if isinstance(given, dict) else {}
    return {n: [placed(one) for one in v] if isinstance(v, list) else placed(v) for n, v in passes.items()}


def _dangling(values: dict[str, Any], entries: list[PassEntry]) -> list[str]:
    """References to systems and data configs that are not there."""
    problems = []
    systems, evaluate = values.get("systems") or {}, values.get("evaluate")
    hosts = [(key, values.get(key)) for key in ("host", "target")] + [(f"{e.path}.host", e.host) for e in entries]
    for key, name in hosts:
        if isinstance(name, str) and name not in systems and name != "local":
            problems.append(f"{key}: no system is called {name!r}{did_you_mean(name, systems)}")
    scored = evaluate.get("data") if isinstance(evaluate, dict) else None
    if isinstance(scored, str) and scored not in values["data"]:
        problems.append(f"evaluate.data: no data config is called {scored!r}{did_you_mean(scored, values['data'])}")
    return problems
