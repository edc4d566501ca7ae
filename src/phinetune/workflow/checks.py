"""What can be wrong with a workflow whose keys are right: passes and the order they stand in, spaces, data they name, search, goals.

Pure functions on the config and the table of passes: each gives its problems as texts, so that all of them can be raised at once. Not
here: what needs the model, the data files or the cache (`plan.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from phinetune.data.messages import DataConfig
from phinetune.errors import ConfigError
from phinetune.evaluation.measurements import measurements
from phinetune.workflow.config import PassEntry, WorkflowConfig
from phinetune.workflow.goals import Goals
from phinetune.workflow.passes import NO_SPACE, Pass, find_pass, pass_table
from phinetune.workflow.spaces import Space, find_spaces, is_space, why_not_exhaustive
from phinetune.workflow.stages import choose_data

Alternatives = dict[str, list[tuple[PassEntry, Pass]]]
"""Name of a pass -> its alternatives, mostly one."""

_MOST_ORDERS = 10_000  # of alternatives that are tried for their order
_KINDS = {"hf": "a model", "adapter": "an adapter", "onnx": "an ONNX model"}
_FIXED = (
    "training_config.output_dir",
    "training_config.overwrite_output_dir",
    "training_config.resume_from_checkpoint",
)


def find_passes(entries: list[PassEntry], note: Callable[[ConfigError], None]) -> Alternatives:
    """The pass of each entry; errors go to `note`."""
    found: Alternatives = {}
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
    return {name: several for name, several in found.items() if several}


def spaces_of(alternatives: Alternatives) -> tuple[list[Space], list[str]]:
    """(every space in the passes, problems). Where a pass has alternatives, their choice is a space itself (`passes.NAME`)."""
    problems: list[str] = []
    spaces = [
        Space(f"passes.{name}", tuple(range(len(several))))
        for name, several in alternatives.items()
        if len(several) > 1
    ]
    for entry, pass_ in itertools.chain(*alternatives.values()):
        found = find_spaces(entry.values, entry.path, problems)
        for space in found:
            key = space.path.removeprefix(f"{entry.path}.")
            if key.split(".")[0].split("[")[0] in (*NO_SPACE, *pass_.data) or key in _FIXED:
                problems.append(f"{space.path}: cannot be searched over")
        spaces += found
    return spaces, problems


def sound(alternatives: Alternatives) -> Alternatives:
    """Those whose spaces are all right."""
    return {
        name: kept
        for name, several in alternatives.items()
        if (kept := [(e, p) for e, p in several if not spaces_of({name: [(e, p)]})[1]])
    }


def data_problems(alternatives: Alternatives, data: dict[str, DataConfig]) -> list[str]:
    """Names of data configs in the passes that name none."""
    problems = []
    for entry, pass_ in itertools.chain(*alternatives.values()):
        for index, key in enumerate(pass_.data):
            given = entry.values.get(key)
            if is_space(given) or (given is None and index > 0):  # a space is a problem of its own
                continue
            if given is not None and not isinstance(given, str):
                problems.append(f"{entry.path}.{key}: must be the name of a data config (found: {given!r})")
                continue
            try:
                choose_data(given, data)
            except ConfigError as error:
                problems += [f"{entry.path}.{key}: {p.removeprefix('data: ')}" for p in error.problems]
    return problems


def order_problems(alternatives: Alternatives, kind: str) -> list[str]:
    """Passes that cannot begin with what the pass before them leaves, for each way to choose alternatives; `kind` is what goes in."""
    problems: list[str] = []
    for chosen in itertools.islice(itertools.product(*alternatives.values()), _MOST_ORDERS):
        problems += misplaced(chosen, kind)
    return list(dict.fromkeys(problems))


def misplaced(passes: Iterable[tuple[PassEntry, Pass]], kind: str) -> list[str]:
    """What is wrong with the order of `passes`, the first one beginning with an artifact of `kind`."""
    problems = []
    for entry, pass_ in passes:
        if kind not in pass_.takes:
            wanted = " or ".join(_KINDS.get(k, k) for k in pass_.takes)
            problems.append(
                f"{entry.path}: {entry.type} takes {wanted}, but what comes before it is {_KINDS.get(kind, kind)}"
            )
        kind = pass_.gives
    return problems


def search_problems(config: WorkflowConfig, spaces: list[Space], alternatives: Alternatives) -> list[str]:
    """A space needs a search, and a search something to aim at."""
    search = config.search
    if search is None:
        return [f"{space.path}: a space of values needs a search (search: {{trials: 12}})" for space in spaces]
    problems = []
    if not config.constraints and not config.objectives:
        problems.append("search: needs objectives or constraints to choose by (objectives: [max exact_match])")
    if search.sampler == "exhaustive":
        endless = [space.path for space in spaces if space.count is None]
        problems += [f"{path}: a range without a step cannot be searched exhaustively" for path in endless]
        if not endless and (problem := why_not_exhaustive(spaces)):
            problems.append(problem)
    if search.truncate_rank and not any(rank_space(e, p, spaces) for e, p in itertools.chain(*alternatives.values())):
        problems.append(
            "search.truncate_rank: no pass has a space of ranks for the adapter that it trains (r: {choices: [8, 16, 32]})"
        )
    return problems


def rank_space(entry: PassEntry, pass_: Pass, spaces: list[Space]) -> Space | None:
    """The space of the rank of the adapters that a pass trains, if it has one."""
    if not pass_.data or pass_.gives != "adapter":
        return None
    return next((space for space in spaces if space.path == f"{entry.path}.r"), None)


def measuring_problems(config: WorkflowConfig, goals: Goals) -> list[str]:
    """Examples that the metrics need, and that nobody gave."""
    table: dict[str, Any] = measurements()
    wanted = [*(config.evaluate.metrics if config.evaluate else ()), *goals.metrics]
    needing = next((name for name in wanted if name in table and table[name].needs != "files"), None)
    if config.data or needing is None:
        return []
    return [f"data: this key is needed: {needing} is measured on it"]
