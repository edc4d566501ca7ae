"""From a workflow to the steps of one trial: each pass with its config object, its cache key, and where its result is or will be.

Everything that can be known before work begins is checked here, and every problem is raised in one error: unknown keys and wrong values
of passes, spaces, goals, references, the order of the passes, data files, places where passes run. Nothing is loaded or computed but
hashes of files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from phinetune.artifact import content_key, file_hash
from phinetune.config import parse
from phinetune.data.messages import DataConfig
from phinetune.data.sources import data_source, is_hub_id
from phinetune.errors import AdapterError, ConfigError, OutputError, PhinetuneError
from phinetune.evaluation.measurements import measurements, parse_metrics
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.load import adapter_base, find
from phinetune.model.embedded import EMBEDDED
from phinetune.model.folder import base_key, resolve_model
from phinetune.systems.config import AcceleratorConfig, SystemConfig, system_problems
from phinetune.workflow.checks import (
    Alternatives,
    data_problems,
    find_passes,
    measuring_problems,
    misplaced,
    order_problems,
    rank_space,
    search_problems,
    sound,
    spaces_of,
)
from phinetune.workflow.config import EvaluateConfig, PassEntry, WorkflowConfig
from phinetune.workflow.goals import Goals, parse_goals
from phinetune.workflow.merge import adapter_key
from phinetune.workflow.passes import Pass, PassJob, parse_pass
from phinetune.workflow.spaces import Space, fill
from phinetune.workflow.stages import PASSES, choose_data
from phinetune.workflow.store import Store
from phinetune.workflow.targets import absent_target, target_of, with_memory

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
    alternatives: Alternatives
    spaces: list[Space]
    goals: Goals
    source: Source
    store: Store
    digests: dict[str, str]
    """Name of a data config -> key of its content and its settings."""

    @property
    def target(self) -> AcceleratorConfig | None:
        """The accelerator that the result is for."""
        return target_of(self.config)

    def steps(self, chosen: dict[str, Any], on_event: OnEvent = log_event, truncated: bool = False) -> list[Step]:
        """The steps with `chosen` values in the spaces (path -> value). Raises ConfigError with what does not fit.

        truncated: adapters are trained at the highest rank of their space, and truncated to the chosen one.
        """
        passes = [(entry, pass_) for entry, pass_, _ in self._entries(chosen, truncated)]
        steps, problems = self.attempt(chosen, on_event, truncated)
        if problems := misplaced(passes, self.source.kind) + problems:
            raise ConfigError(problems)
        return steps

    def attempt(
        self, chosen: dict[str, Any], on_event: OnEvent = log_event, truncated: bool = False
    ) -> tuple[list[Step], list[str]]:
        """(steps whose keys are right, problems of the others), whatever their order."""
        steps: list[Step] = []
        problems: list[str] = []
        parent, place = self.source.key, self.source.name
        for entry, pass_, values in self._entries(chosen, truncated):
            try:
                config, wrong = self._config(entry, pass_, values)
                problems += wrong
                key = self._key(entry, pass_, config, parent)
            except ConfigError as error:
                problems += error.problems
                continue
            job = PassJob(
                config, place, self.store.artifact(key), self.config.model.model_kwargs, self.config.data, self.config.seed, on_event
            )  # fmt: skip
            steps.append(Step(entry, pass_, job, key, parent, self._system(entry)))
            parent, place = key, str(job.output)
        return steps, problems

    def _config(self, entry: PassEntry, pass_: Pass, values: dict[str, Any]) -> tuple[Any, list[str]]:
        """(config of a pass, problems of the keys that were left out for it). Raises ConfigError if the others make none."""
        try:
            return parse_pass(entry, pass_, values, self.target), []
        except ConfigError as error:
            starts = {key: tuple(f"{entry.path}.{key}{after}" for after in ".:[") for key in values}
            kept = {k: v for k, v in values.items() if not any(p.startswith(starts[k]) for p in error.problems)}
            if len(kept) == len(values):
                raise
            with contextlib.suppress(ConfigError):
                return parse_pass(entry, pass_, kept, self.target), error.problems
            raise

    def _entries(self, chosen: dict[str, Any], truncated: bool) -> Iterator[tuple[PassEntry, Pass, dict[str, Any]]]:
        """(entry, pass, its keys with the spaces filled) of each pass of the trial."""
        for name, alternatives in self.alternatives.items():
            entry, pass_ = alternatives[chosen.get(f"passes.{name}", 0)]
            values = fill(entry.values, entry.path, chosen)
            search, mine = self.config.search, [s for s in self.spaces if s.path.startswith(f"{entry.path}.")]
            training = values.get("training_config") or {}
            pruned = search is not None and search.pruner != "none" and mine and self._holds_out(pass_, values)
            if pruned and isinstance(training, dict) and not {"eval_strategy", "evaluation_strategy"} & set(training):
                values["training_config"] = {"eval_strategy": "epoch", **training}  # what a pruner goes by
            ranks = rank_space(entry, pass_, mine)
            if not truncated or ranks is None:
                yield entry, pass_, values
                continue
            highest = max(ranks.examples())
            yield entry, pass_, {**values, "r": highest}
            if values["r"] < highest:
                own = replace(entry, name=f"{name}-truncated", type="TruncateAdapter", values={})
                yield own, PASSES["TruncateAdapter"], {"r": values["r"]}

    def _holds_out(self, pass_: Pass, values: dict[str, Any]) -> bool:
        """True if the pass trains, and has examples to see its held-out loss on."""
        if not _trains(pass_):
            return False
        with contextlib.suppress(ConfigError):
            name = choose_data(values.get(pass_.data[0]), self.config.data)
            return any(values.get(key) for key in pass_.data[1:]) or self.config.data[name].test_fraction > 0
        return False

    def _system(self, entry: PassEntry) -> SystemConfig:
        return self.config.systems.get(entry.host or self.config.host or "local", LOCAL)

    def _key(self, entry: PassEntry, pass_: Pass, config: Any, parent: str) -> str:
        """What decides the step's result: input, pass, settings, and the content of the data and files that they name."""
        values = asdict(config)
        files = {name: _contents(values[name], f"{entry.path}.{name}") for name in pass_.files if values.get(name)}
        used = {}
        for index, name in enumerate(pass_.data):
            if index == 0 or values.get(name):
                with contextlib.suppress(ConfigError):  # a problem of its own
                    used[name] = self.digests.get(choose_data(values.get(name), self.config.data), "")
        script = file_hash(Path(entry.user_script).expanduser()) if entry.user_script else ""
        settings = {k: v for k, v in values.items() if k not in (*pass_.data, *pass_.files)}
        kwargs = {k: v for k, v in self.config.model.model_kwargs.items() if k not in _SECRETS}
        return content_key(
            "pass", parent, entry.type.lower(), pass_.version, settings, files, used, script, kwargs, self.config.seed
        )


_SECRETS = ("token", "use_auth_token")  # of model_kwargs: who fetches a model, not what it is


def _trains(pass_: Pass) -> bool:
    """True for a pass that is configured by names of transformers.TrainingArguments."""
    return bool(pass_.data) and "training_config" in pass_.config.__dataclass_fields__  # type: ignore[attr-defined]


def _contents(named: Any, path: str) -> list[str]:
    """Hashes of the file, or the files, that a key names. Raises ConfigError for one that is not there."""
    hashes = []
    for name in [named] if isinstance(named, str | Path) else named:
        try:
            hashes.append(file_hash(Path(name).expanduser()))
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise ConfigError(f"{path}: {name}: {reason}") from None
    return hashes


def prepare(
    config: WorkflowConfig, entries: list[PassEntry], on_event: OnEvent = log_event, fetch: bool = True
) -> Workflow:
    """The workflow with its passes, spaces, goals, model and data found. Raises one ConfigError with every problem.

    fetch: get a model or data of the hub that is not here yet; false: plan with its name only.
    """
    workflow, problems, hints = _examine(config, entries, on_event, fetch, find_source)
    if problems or workflow is None:
        raise ConfigError(problems, hints[0] if len(set(hints)) == 1 else "")
    if config.search and not workflow.spaces:
        on_event(Note("search: no pass has a space of values, so there is one trial", warning=True))
    return workflow


def other_problems(config: WorkflowConfig, entries: list[PassEntry], whole: bool) -> list[str]:
    """What `prepare` would find in the readable part of a file that has problems already.

    A model without a path is not looked for; where the entries are not the `whole` of the passes, their order says nothing.
    """

    def source(config: WorkflowConfig, on_event: OnEvent) -> Source:
        name = config.model.adapter or config.model.path
        kind = "hf" if not name or name in EMBEDDED else find(name, config.model.model_kwargs, on_event)[1]
        return Source(name, kind, "")

    return _examine(config, entries, lambda event: None, False, source, whole)[1]


def _examine(
    config: WorkflowConfig,
    entries: list[PassEntry],
    on_event: OnEvent,
    fetch: bool,
    source_of: Callable[[WorkflowConfig, OnEvent], Source],
    whole: bool = True,
) -> tuple[Workflow | None, list[str], list[str]]:
    """(workflow, every problem, their hints)."""
    problems: list[str] = []
    hints: list[str] = []

    def note(error: PhinetuneError, prefix: str = "") -> None:
        problems.extend(prefix + problem for problem in error.problems)
        hints.extend([error.hint] if error.hint else [])

    goals, store, digests = Goals(), None, {}
    try:
        goals = with_memory(parse_goals(config.constraints, config.objectives, list(measurements())), config)
        problems += absent_target(config, goals)
    except ConfigError as error:
        note(error)
    try:
        if config.evaluate and config.evaluate.metrics:
            parse_metrics(config.evaluate.metrics)
    except ConfigError as error:
        note(error, "evaluate.")
    alternatives = find_passes(entries, note)
    spaces, wrong = spaces_of(alternatives)
    problems += wrong
    for name, data in config.data.items():
        try:
            digests[name] = data_key(data, on_event, fetch)
        except PhinetuneError as error:
            place = f"data.{name}" if len(config.data) > 1 else "data"
            own = [p.removeprefix("data") if p.startswith("data.") else f": {p}" for p in error.problems]
            note(ConfigError([place + problem for problem in own], error.hint))
    problems += data_problems(alternatives, config.data)
    source = Source(config.model.path, "hf", "")
    found = False
    try:
        if fetch or not missing_model(config):
            source = source_of(config, on_event)
        found = True
    except PhinetuneError as error:
        note(error, "model: ")
    for host in {e.host or config.host for e in entries} - {None, "local"}:
        if host in config.systems:
            problems += [f"systems.{host}: {problem}" for problem in system_problems(config.systems[host])]
    problems += search_problems(config, spaces, alternatives) + measuring_problems(config, goals)
    if found and whole and sum(map(len, alternatives.values())) == len(entries):
        problems += order_problems(alternatives, source.kind)
    try:
        store = Store(config.cache_dir)
    except OutputError as error:
        note(error, "cache_dir: ")
        return None, problems, hints
    tried = sound(alternatives)
    problems += _try_every_choice(Workflow(config, tried, spaces_of(tried)[0], goals, source, store, digests))
    workflow = Workflow(config, alternatives, spaces, goals, source, store, digests)
    return workflow, list(dict.fromkeys(problems)), hints


def data_key(data: DataConfig, on_event: OnEvent = log_event, fetch: bool = True) -> str:
    """Key of a data config: its settings, and the type and content of its file. Raises DataError if it is not there.

    Without `fetch`, the key of a data set of the hub that is not here yet is one that no other has.
    """
    settings = asdict(data) | {"path": ""}
    try:
        file = data_source(data, on_event, fetch)
    except PhinetuneError:
        if fetch or Path(data.path).expanduser().exists() or not is_hub_id(data):
            raise
        on_event(Note(f"data: {data.path} is to be fetched from the hub"))
        return content_key(settings, "not here", data.path)
    return content_key(settings, file.suffix.lower(), file_hash(file))


def find_source(config: WorkflowConfig, on_event: OnEvent = log_event) -> Source:
    """The model that goes in, found and hashed. Raises ModelError or AdapterError if it is not there, or not whole."""
    name = config.model.adapter or config.model.path
    folder, kind = find(name, config.model.model_kwargs, on_event)
    if config.model.adapter and kind != "adapter":
        raise AdapterError(f"{name}: is no adapter", "leave model.adapter out, or give the output folder of finetune")
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
    folder = Path(name).expanduser()
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.is_dir()
    if name in EMBEDDED or folder.exists() or not is_hub_id:
        return False
    try:
        resolve_model(name, {**config.model.model_kwargs, "local_files_only": True}, lambda event: None)
    except PhinetuneError:
        return True
    return False


def _try_every_choice(workflow: Workflow) -> list[str]:
    """Problems of the passes' keys with each value of each space in turn, the others at their first one; and of a missing package."""
    first = {space.path: space.examples()[0] for space in workflow.spaces}
    tries = [first]
    for space in workflow.spaces:
        owner = _alternative_with(space, workflow.alternatives)
        tries += [{**first, **owner, space.path: value} for value in space.examples()]
    ways = {False, bool(workflow.config.search and workflow.config.search.truncate_rank)}
    problems: dict[str, None] = {}
    checked: set[str] = set()
    for chosen in tries:
        for truncated in sorted(ways):
            steps, wrong = workflow.attempt(chosen, truncated=truncated)
            problems |= dict.fromkeys(wrong)
            for step in steps:
                if step.key in checked or not step.pass_.check or workflow.store.has(step.key):
                    continue
                checked.add(step.key)
                try:
                    step.pass_.check(step.job)
                except PhinetuneError as error:
                    problems |= dict.fromkeys(f"{step.entry.path}.{problem}" for problem in error.problems)
    return list(problems)


def _alternative_with(space: Space, alternatives: Alternatives) -> dict[str, Any]:
    """The choice of an alternative that makes `space` count, if it stands in one."""
    return {
        f"passes.{name}": index
        for name, several in alternatives.items()
        for index, (entry, _) in enumerate(several)
        if len(several) > 1 and space.path.startswith(f"{entry.path}.")
    }


def default_evaluation(config: WorkflowConfig) -> EvaluateConfig:
    """The evaluation of a workflow that says none: what its goals need."""
    return config.evaluate or parse(EvaluateConfig, {"metrics": []}, "evaluate")
