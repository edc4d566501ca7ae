"""Which models are compared, under which names, on which examples: all that can be wrong is found before any of them is loaded.

The examples are chosen once, by the first model that phinetune trained or by the data given, and encoded for each model in its own
prompt. That every model is asked the same ones is checked row by row: a template or a context of its own may leave rows out, or hold
other ones out. Not here: loading, measuring.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.data.messages import DataConfig
from phinetune.errors import ConfigError, DataError, OutputError, PhinetuneError, did_you_mean
from phinetune.evaluation.assessment import Effort, answerable
from phinetune.evaluation.metrics import METRICS
from phinetune.events import Event, OnEvent, nobody
from phinetune.generation.load import find, find_manifest
from phinetune.generation.onnx_backend import ADAPTER_SUFFIX, check_complete, onnx_runtime
from phinetune.workflow.assess import Subject, check_effort, with_examples
from phinetune.workflow.held_out import Part, Split

RESULTS, REPORT = "results.json", "report.html"
_ASKED = ("stop_rate",)  # whatever the metric, examples are answered
Models = Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """The arguments of `compare` that say what is compared and how it is judged."""

    models: Models
    data: DataConfig | str | dict[str, Any] | None
    metric: str
    split: Split | None
    max_examples: int | None
    effort: Effort
    reference: str | None
    base_model: str | None
    model_kwargs: dict[str, Any] | None
    output_dir: str | Path | None
    overwrite: bool


@dataclass(frozen=True)
class Subjects:
    """The models by stage name, in order; the stage of reference, the stage by whose training the examples were chosen, and what to mind."""

    by_name: dict[str, Subject]
    reference: str
    source: str
    notes: tuple[str, ...] = ()

    @property
    def part(self) -> Part:
        """The examples, as they are encoded for the source."""
        part = self.by_name[self.source].part
        if part is None:
            raise RuntimeError("no examples were chosen")
        return part


def find_subjects(request: Request, on_event: OnEvent) -> Subjects:
    """The models of `request`, found, and the examples they are asked. Raises one PhinetuneError with every problem."""
    errors: list[PhinetuneError] = []
    notes: list[str] = []
    found = _found(request, errors, on_event)
    subjects = stage_names(request.models, found)
    _check_choices(request, list(subjects), len(found) == len(request.models), errors)
    trained = next((n for n, s in subjects.items() if _is_trained(s)), None)
    source = trained or next(iter(subjects), "")
    if subjects and (request.data is not None or trained or len(found) == len(request.models)):
        subjects = _with_same_examples(subjects, source, request, errors, notes, on_event)
    raise_all(errors)
    adapter = next((n for n, s in subjects.items() if s.kind == "adapter"), None)
    reference = request.reference or adapter or next(iter(subjects))
    return Subjects(subjects, reference, source, tuple(notes))


def _found(request: Request, errors: list[PhinetuneError], on_event: OnEvent) -> dict[str, Subject]:
    """Every model that is there and whose runtime is, by what it was given as (mappings: by stage name)."""
    models = request.models
    if not models or isinstance(models, str) or not all(isinstance(m, str) and m.strip() for m in models):
        raise ConfigError("models: give a list of models, or stage names and models", "give at least one model")
    pairs = models.items() if isinstance(models, Mapping) else ((m, m) for m in dict.fromkeys(models))
    subjects = {}
    for name, model in pairs:
        with _noted(errors):
            folder, kind = find(model, request.model_kwargs, on_event)
            if kind == "onnx":
                onnx_runtime()
                check_complete(folder)
            subjects[name] = Subject(model, folder, kind, request.base_model, request.model_kwargs)
    if not isinstance(models, Mapping) and len(set(models)) < len(models):
        errors.append(ConfigError("models: one of them is given twice", "give each model once"))
    return subjects


def stage_names(models: Models, found: dict[str, Subject]) -> dict[str, Subject]:
    """The models found by stage name: the one given, or by what they are: base, adapter, merged, ONNX int4; folders tell equals apart."""
    if isinstance(models, Mapping):
        return found
    plain = {model: _plain_name(subject) for model, subject in found.items()}
    names: dict[str, Subject] = {}
    for model, subject in found.items():
        name = plain[model]
        if list(plain.values()).count(name) > 1:
            name = f"{name} ({subject.folder.name or model})"
        while name in names:
            name += "'"
        names[name] = subject
    return names


def _plain_name(subject: Subject) -> str:
    """What a model is, in a word or two."""
    manifest = find_manifest(subject.model, subject.folder)
    if subject.kind == "onnx":
        precision = (manifest.get("export") or {}).get("precision")
        adapter = Path(subject.model).stem if subject.model.endswith(ADAPTER_SUFFIX) else None
        return " ".join(filter(None, ["ONNX", precision, adapter and f"+ {adapter}"]))
    if subject.kind == "adapter":
        return "adapter"
    return "merged" if manifest.get("stage") == "merge" else "base"


def _is_trained(subject: Subject) -> bool:
    return bool(find_manifest(subject.model, subject.folder).get("data"))


def _check_choices(request: Request, names: list[str], all_found: bool, errors: list[PhinetuneError]) -> None:
    """Note a metric, a number, a split, a reference and a folder that cannot be."""
    if request.metric not in METRICS:
        near = did_you_mean(request.metric, METRICS)
        known = ", ".join(METRICS)
        errors.append(
            ConfigError(
                f"metric: {request.metric!r} does not judge single answers{near}",
                f"models are compared by one of {known}",
            )
        )
    if request.split not in (None, "test", "train", "all"):
        errors.append(ConfigError(f"split: must be test, train or all (found: {request.split!r})"))
    if request.reference is not None and request.reference not in names and all_found:
        near = did_you_mean(request.reference, names)
        errors.append(
            ConfigError(
                f"reference: no stage is called {request.reference!r}{near}", f"the stages are {', '.join(names)}"
            )
        )
    with _noted(errors):
        check_effort(request.effort, request.max_examples)
    with _noted(errors):
        _check_folder(request.output_dir, request.overwrite)


def _check_folder(output_dir: str | Path | None, overwrite: bool) -> None:
    """Raises OutputError where results and report cannot be written, or would take another run's place unasked."""
    if output_dir is None:
        return
    folder = Path(output_dir).expanduser().absolute()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OutputError(f"{nearest}: cannot be written as a folder", "choose another output folder")
    for file in (folder / RESULTS, folder / REPORT):
        if file.is_dir():
            raise OutputError(f"{file}: is a folder", "choose another output folder")
        if file.exists() and not overwrite:
            raise OutputError(f"{file}: is there already", "choose another output folder, or pass --overwrite")


def _with_same_examples(
    subjects: dict[str, Subject],
    source: str,
    request: Request,
    errors: list[PhinetuneError],
    notes: list[str],
    on_event: OnEvent,
) -> dict[str, Subject]:
    """Each subject with the examples chosen for `source`, in its own prompt. What keeps numbers from being comparable goes to `notes`."""
    split = request.split if request.split in ("test", "train", "all") else None
    most = request.max_examples if request.max_examples and request.max_examples > 0 else None
    before = len(errors)
    with _noted(errors):
        first = with_examples(subjects[source], request.data, _ASKED, split, most, on_event)
    if len(errors) > before or first.part is None:
        return subjects
    chosen, ready = first.part, {**subjects, source: first}
    with _noted(errors):
        answerable(chosen.examples, [request.metric], chosen.config.path, on_event)
    ids = _ids(chosen)
    for name in [n for n in subjects if n != source]:
        with _noted(errors):
            ready[name] = _asked_the_same(subjects[name], name, chosen, source, most, notes, on_event)
            if _ids(ready[name].part) != ids:
                notes.append(
                    f"{name}: reads the examples as other tokens than {source}; perplexity and tokens/s count tokens, so these do not compare"
                )
    return ready


def _ids(part: Part | None) -> list[tuple[list[int], int]]:
    """Of each example: all its ids, and how many of them are the prompt's."""
    if part is None:
        return []
    table = part.examples.table
    return list(zip(table["input_ids"], table["prompt_length"], strict=True))


def _asked_the_same(
    subject: Subject, name: str, chosen: Part, source: str, most: int | None, notes: list[str], on_event: OnEvent
) -> Subject:
    """`subject` with the rows of `chosen`, the stage `source`'s. Raises DataError if one of them is not to be had for it."""
    found = with_examples(subject, chosen.config, _ASKED, chosen.split, most, on_event)
    wanted = _rows(chosen)
    if _rows(found.part) == wanted:
        return found
    # what is held out is drawn by the prompts' ids, so with other ids it is other rows: take those that were chosen
    every = with_examples(subject, replace(chosen.config, test_fraction=0.0), _ASKED, "all", None, nobody)
    rows = {row: i for i, row in enumerate(_rows(every.part))}
    missing = [row for row in wanted if row not in rows]
    if missing or every.part is None:
        raise DataError(
            f"{name}: cannot be asked the same examples as {source}: {len(missing)} of {len(wanted)} are not to be had for it, "
            f"such as {missing[0][0]}",
            "they may be too long for it, or read otherwise in its template: give other data, or leave that model out",
        )
    if chosen.split == "test" and _is_trained(subject):
        unseen = set(_rows(with_examples(subject, chosen.config, _ASKED, "test", None, nobody).part))
        if seen := sum(row not in unseen for row in wanted):
            notes.append(
                f"{name}: {seen} of the {len(wanted)} examples are not among those that its own training held out"
            )
    examples = every.part.examples.subset([rows[row] for row in wanted])
    return replace(every, part=replace(chosen, examples=examples))


def _rows(part: Part | None) -> list[tuple[str, str, bool]]:
    """Of each example: where it stands, its reference, and whether there is a prompt to ask."""
    if part is None:
        return []
    table = part.examples.table
    asked = (length > 0 for length in table["prompt_length"])
    return list(zip(table["place"], table["completion"], asked, strict=True))


@contextlib.contextmanager
def _noted(errors: list[PhinetuneError]) -> Iterator[None]:
    """What the user can mend goes to `errors`."""
    try:
        yield
    except PhinetuneError as error:
        errors.append(error)


def raise_all(errors: Sequence[PhinetuneError]) -> None:
    """Raise the one error, or one ConfigError with all their problems and hints."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = dict.fromkeys(problem for error in errors for problem in error.problems)
        raise ConfigError(list(problems), "; ".join(dict.fromkeys(error.hint for error in errors if error.hint)))


def said_once(on_event: OnEvent) -> OnEvent:
    """A listener that passes every note on the first time only: what holds for several models is said once."""
    said: set[str] = set()

    def listen(event: Event) -> None:
        text = getattr(event, "text", None)
        if text is None or text not in said:
            said.add(text or "")
            on_event(event)

    return listen
