"""From a workflow to the steps of one trial: each pass with its config object, its cache key, and where its result is or will be.

Everything that can be known before work begins is checked here, and every problem is raised in one error: unknown keys and wrong values
of passes, spaces, goals, references, the order of the passes, data files, places where passes run. Nothing is loaded or computed but
hashes of files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from phinetune.artifact import content_key, file_hash
from phinetune.config import parse
from phinetune.data.messages import DataConfig
from phinetune.data.sources import data_source
from phinetune.errors import ConfigError, PhinetuneError
from phinetune.evaluation.measurements import measurements, parse_metrics
from phinetune.events import OnEvent, log_event
from phinetune.generation.load import adapter_base, find
from phinetune.model.embedded import EMBEDDED
from phinetune.model.folder import base_key, resolve_model
from phinetune.systems.config import AcceleratorConfig, SystemConfig, system_problems
from phinetune.workflow.config import EvaluateConfig, PassEntry, WorkflowConfig
from phinetune.workflow.goals import Goals, parse_goals
from phinetune.workflow.merge import adapter_key
from phinetune.workflow.passes import NO_SPACE, Pass, PassJob, find_pass, parse_pass, pass_table
from phinetune.workflow.spaces import Space, fill, find_spaces
from phinetune.workflow.stages import PASSES, choose_data
from phinetune.workflow.store import Store

LOCAL = SystemConfig()


@dataclass(frozen=True)
class Source:
    """The model that goes in: its name or folder, what kind it is, and the key of its content."""

    name: str
    kind: str
    key: str


@dataclass(frozen=True)
class Step:
    """One pass of one trial, ready to run."""

    entry: PassEntry
    pass_: Pass
    job: PassJob
    key: str
    parent: str
    """Key of the artifact it begins with."""
    system: SystemConfig = field(default_factory=lambda: LOCAL)


@dataclass(frozen=True)
class Workflow:
    """A workflow whose every part was found and fits: what a run needs."""

    config: WorkflowConfig
    alternatives: dict[str, list[tuple[PassEntry, Pass]]]
    """Name of a pass -> its alternatives (mostly one)."""
    spaces: list[Space]
    goals: Goals
    source: Source
    store: Store
    digests: dict[str, str]
    """Name of a data config -> key of its content and its settings."""

    @property
    def target(self) -> AcceleratorConfig | None:
        """The accelerator that the result is for."""
        name = self.config.target
        return self.config.systems[name].accelerator if name in self.config.systems else None

    def steps(self, chosen: dict[str, Any], on_event: OnEvent = log_event, truncated: bool = False) -> list[Step]:
        """The steps with `chosen` values in the spaces (path -> value). Raises ConfigError with what does not fit.

        truncated: adapters are trained at the highest rank of their space, and truncated to the chosen one.
        """
        steps: list[Step] = []
        problems: list[str] = []
        kind, parent, place = self.source.kind, self.source.key, self.source.name
        for entry, pass_, values in self._entries(chosen, truncated):
            if kind not in pass_.takes:
                made_by = f"what comes before it is {_KINDS.get(kind, kind)}"
                problems.append(f"{entry.path}: {entry.type} takes {_either(pass_.takes)}, but {made_by}")
                break
            kind = pass_.gives
            try:
                config = parse_pass(entry, pass_, values, self.target)
            except ConfigError as error:
                problems += error.problems
                continue
            key = self._key(entry, pass_, config, parent)
            job = PassJob(
                config, place, self.store.artifact(key), self.config.model.model_kwargs, self.config.data, self.config.seed, on_event
            )  # fmt: skip
            steps.append(Step(entry, pass_, job, key, parent, self._system(entry)))
            parent, place = key, str(job.output)
        if problems:
            raise ConfigError(problems)
        return steps

    def _entries(self, chosen: dict[str, Any], truncated: bool) -> Iterator[tuple[PassEntry, Pass, dict[str, Any]]]:
        """(entry, pass, its keys with the spaces filled) of each pass of the trial."""
        for name, alternatives in self.alternatives.items():
            entry, pass_ = alternatives[chosen.get(f"passes.{name}", 0)]
            values = fill(entry.values, entry.path, chosen)
            search, mine = self.config.search, [s for s in self.spaces if s.path.startswith(f"{entry.path}.")]
            if search and search.pruner != "none" and pass_.data and mine:  # what a pruner goes by
                values["training_config"] = {"eval_strategy": "epoch", **values.get("training_config", {})}
            ranks = next((s for s in mine if s.path == f"{entry.path}.r"), None)
            if not truncated or ranks is None:
                yield entry, pass_, values
                continue
            highest = max(ranks.examples())
            yield entry, pass_, {**values, "r": highest}
            if values["r"] < highest:
                own = replace(entry, name=f"{name}-truncated", type="TruncateAdapter", values={})
                yield own, PASSES["TruncateAdapter"], {"r": values["r"]}

    def _system(self, entry: PassEntry) -> SystemConfig:
        return self.config.systems.get(entry.host or self.config.host or "local", LOCAL)

    def _key(self, entry: PassEntry, pass_: Pass, config: Any, parent: str) -> str:
        """What decides the step's result: input, pass, settings, and the content of the data and files that they name."""
        values = asdict(config)
        files = {name: file_hash(Path(values[name]).expanduser()) for name in pass_.files if values.get(name)}
        used = {}
        for index, name in enumerate(pass_.data):
            if index == 0 or values.get(name):
                used[name] = self.digests[choose_data(values.get(name), self.config.data)]
        script = file_hash(Path(entry.user_script).expanduser()) if entry.user_script else ""
        settings = {k: v for k, v in values.items() if k not in (*pass_.data, *pass_.files)}
        kwargs = {k: v for k, v in self.config.model.model_kwargs.items() if "token" not in k}
        return content_key(
            "pass", parent, entry.type.lower(), pass_.version, settings, files, used, script, kwargs, self.config.seed
        )


_KINDS = {"hf": "a model", "adapter": "an adapter", "onnx": "an ONNX model"}


def _either(kinds: Iterable[str]) -> str:
    return " or ".join(_KINDS.get(kind, kind) for kind in kinds)


def prepare(
    config: WorkflowConfig, entries: list[PassEntry], on_event: OnEvent = log_event, fetch: bool = True
) -> Workflow:
    """The workflow with its passes, spaces, goals, model and data found. Raises one ConfigError with every problem.

    fetch: get a model of the hub that is not here yet; false: plan with its name only.
    """
    problems: list[str] = []
    hints: list[str] = []

    def note(error: PhinetuneError, prefix: str = "") -> None:
        problems.extend(prefix + problem for problem in error.problems)
        hints.extend([error.hint] if error.hint else [])

    goals = Goals()
    try:
        goals = parse_goals(config.constraints, config.objectives, list(measurements()))
    except ConfigError as error:
        note(error)
    try:
        if config.evaluate and config.evaluate.metrics:
            parse_metrics(config.evaluate.metrics)
    except ConfigError as error:
        note(error, "evaluate.")
    alternatives = _find_passes(entries, note)
    spaces = _find_spaces(entries, alternatives, problems)
    digests: dict[str, str] = {}
    for name, data in config.data.items():
        try:
            digests[name] = data_key(data)
        except PhinetuneError as error:
            note(error, f"data.{name}: " if len(config.data) > 1 else "data: ")
    _check_data_names(config, alternatives, problems)
    source = Source(config.model.path, "hf", "")
    try:
        source = (
            find_source(config, on_event) if fetch or not missing_model(config) else Source(config.model.path, "hf", "")
        )
    except PhinetuneError as error:
        note(error, "model: ")
    for name in {e.host or config.host for e in entries} - {None, "local"}:
        if name in config.systems:
            problems += [f"systems.{name}: {problem}" for problem in system_problems(config.systems[name])]
    _check_search(config, spaces, alternatives, goals, problems)
    workflow = Workflow(config, alternatives, spaces, goals, source, Store(config.cache_dir), digests)
    if not problems:
        problems += _try_every_choice(workflow)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), hints[0] if len(set(hints)) == 1 else "")
    return workflow


def data_key(data: DataConfig) -> str:
    """Key of a data config: its settings, and the content of its file. Raises DataError if it is not there."""
    return content_key(asdict(data) | {"path": ""}, file_hash(data_source(data)))


def find_source(config: WorkflowConfig, on_event: OnEvent = log_event) -> Source:
    """The model that goes in, found and hashed. Raises ModelError or AdapterError if it is not there, or not whole."""
    name = config.model.adapter or config.model.path
    folder, kind = find(name, config.model.model_kwargs, on_event)
    if kind == "adapter":
        base = adapter_base(folder, config.model.path if config.model.adapter else None, on_event)
        return Source(str(folder.resolve()), kind, content_key(adapter_key(folder), base_key(base)))
    if kind == "onnx":
        return Source(str(folder.resolve()), kind, file_hash(*sorted(f for f in folder.iterdir() if f.is_file())))
    is_folder = Path(name).expanduser().is_dir()
    return Source(str(folder.resolve()) if is_folder else name, kind, base_key(folder))


def missing_model(config: WorkflowConfig) -> bool:
    """True if the model that goes in must be fetched from the hub first."""
    name = config.model.path
    if name in EMBEDDED or Path(name).expanduser().exists() or "/" not in name:
        return False
    try:
        resolve_model(name, {**config.model.model_kwargs, "local_files_only": True}, lambda event: None)
    except PhinetuneError:
        return True
    return False


def _find_passes(entries: list[PassEntry], note: Any) -> dict[str, list[tuple[PassEntry, Pass]]]:
    found: dict[str, list[tuple[PassEntry, Pass]]] = {}
    try:
        table = pass_table()
    except ConfigError as error:
        note(error)
        return found
    for entry in entries:
        try:
            found.setdefault(entry.name, []).append((entry, find_pass(entry, table)))
        except ConfigError as error:
            note(error)
    return found


def _find_spaces(
    entries: list[PassEntry], alternatives: dict[str, list[tuple[PassEntry, Pass]]], problems: list[str]
) -> list[Space]:
    """Every space in the passes; where a pass has alternatives, their choice is a space itself (`passes.NAME`)."""
    spaces = []
    for name, several in alternatives.items():
        if len(several) > 1:
            spaces.append(Space(f"passes.{name}", tuple(range(len(several)))))
    for entry in entries:
        found = find_spaces(entry.values, entry.path, problems)
        for space in found:
            key = space.path.removeprefix(f"{entry.path}.")
            if key.split(".")[0] in NO_SPACE or key in _FIXED:
                problems.append(f"{space.path}: cannot be searched over")
        spaces += found
    return spaces


_FIXED = (
    "training_config.output_dir",
    "training_config.overwrite_output_dir",
    "training_config.resume_from_checkpoint",
)


def _check_data_names(
    config: WorkflowConfig, alternatives: dict[str, list[tuple[PassEntry, Pass]]], problems: list[str]
) -> None:
    for entry, pass_ in itertools.chain(*alternatives.values()):
        for index, name in enumerate(pass_.data):
            given = entry.values.get(name)
            if index == 0 or given is not None:
                try:
                    choose_data(given, config.data)
                except ConfigError as error:
                    problems += [f"{entry.path}.{name}: {p.removeprefix('data: ')}" for p in error.problems]


def _check_search(
    config: WorkflowConfig,
    spaces: list[Space],
    alternatives: dict[str, list[tuple[PassEntry, Pass]]],
    goals: Goals,
    problems: list[str],
) -> None:
    """A space needs a search, and a search something to aim at."""
    if config.search is None:
        problems += [f"{space.path}: a space of values needs a search (search: {{trials: 12}})" for space in spaces]
    elif not goals.metrics:
        problems.append("search: needs objectives or constraints to choose by (objectives: [max exact_match])")
    if config.search and config.search.sampler == "exhaustive" and len(spaces) > 0:
        endless = [space.path for space in spaces if space.grid() is None]
        problems += [f"{path}: a range without a step cannot be searched exhaustively" for path in endless]
    if config.search and config.search.truncate_rank and not any(s.path.endswith(".r") for s in spaces):
        problems.append("search.truncate_rank: no pass has a space of ranks (r: {choices: [8, 16, 32]})")
    if config.evaluate is None and goals.metrics and not config.data:
        problems.append("data: this key is needed: constraints and objectives are measured on it")


def _try_every_choice(workflow: Workflow) -> list[str]:
    """Problems of the passes' keys with each value of each space in turn, the others at their first one; and of a missing package."""
    first = {space.path: space.examples()[0] for space in workflow.spaces}
    tries = [first] + [{**first, s.path: value} for s in workflow.spaces for value in s.examples()[1:]]
    problems: list[str] = []
    checked: set[str] = set()
    for chosen in tries:
        try:
            steps = workflow.steps(chosen)
        except ConfigError as error:
            problems += [p for p in error.problems if p not in problems]
            continue
        for step in steps:
            if step.key in checked or not step.pass_.check or workflow.store.has(step.key):
                continue
            checked.add(step.key)
            try:
                step.pass_.check(step.job)
            except PhinetuneError as error:
                problems += [p for problem in error.problems if (p := f"{step.entry.path}.{problem}") not in problems]
    return problems


def default_evaluation(config: WorkflowConfig) -> EvaluateConfig:
    """The evaluation of a workflow that says none: what its goals need."""
    return config.evaluate or parse(EvaluateConfig, {"metrics": []}, "evaluate")
