"""`passes` in the order they run: types, hosts, alternatives, one flow of pass_flows, and the merge that Olive's order left unsaid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.building import extract_adapters, model_builder, onnx_conversion, rtn
from phinetune.olive.context import Context
from phinetune.olive.eras import SUMMER
from phinetune.olive.lora import lora
from phinetune.olive.reader import Reader, dotted
from phinetune.olive.registry import known_type, refusal
from phinetune.olive.systems import system_reference

_TRAINING = ("LoRA", "QLoRA", "LoftQ", "DoRA")
_BUILDING = ("ModelBuilder", "OnnxConversion")
_OWN: dict[str, Callable[[Reader, tuple[str, ...], Context, bool], dict[str, Any]]] = {
    "ModelBuilder": model_builder,
    "OnnxConversion": onnx_conversion,
    "ExtractAdapters": extract_adapters,
    "Rtn": rtn,
}
_MERGE = "merge_adapter_weights"


@dataclass
class Step:
    """A pass of the file, translated: its place there and its native keys."""

    place: str
    kind: str
    values: dict[str, Any]
    merges: bool = False
    """An OnnxConversion that merges the adapter itself."""


def read_passes(top: Reader, context: Context) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """(native passes, the evaluators that passes name, with their places)."""
    report = context.report
    given = top.take("passes", dict)
    flow = _flow(top, given or {}, context)
    evaluators: list[tuple[str, Any]] = []
    steps: dict[str, list[Step]] = {}
    for name, one in (given or {}).items():
        several = isinstance(one, list)
        alternatives = one if several else [one]
        if not alternatives:
            report.problem(f"passes.{name}", "an empty list of alternatives")
        for index, values in enumerate(alternatives):
            place = f"passes.{name}[{index}]" if several else f"passes.{name}"
            at = (
                ("passes", name, str(index))
                if several and len(alternatives) > 1 and context.searching
                else ("passes", name)
            )
            mark, before = report.mark(), (dict(context.trained_on), list(evaluators))
            step = _step(values, place, at, context, evaluators)
            second = several and index > 0 and not context.searching
            if second or (flow is not None and name not in flow):
                report.forget(mark)
                context.trained_on, evaluators[:] = before
                reason = (
                    "without a search only the first of several alternatives runs, as in Olive"
                    if second
                    else "it is in no flow of pass_flows"
                )
                report.note("dropped", place, reason)
            elif step is not None:
                steps.setdefault(name, []).append(step)
    if not steps and not report.problems:
        reason = "this key is needed; where Olive chose passes by auto_optimizer_config, name them: ModelBuilder with precision int4, say"
        report.problem(top.path("passes"), reason)
    ordered = {name: steps[name] for name in (flow if flow is not None else steps) if name in steps}
    ordered = _merge_first(_fold_extraction(_fold_rtn(ordered, context), context), context)
    native = {name: [s.values for s in found] if len(found) > 1 else found[0].values for name, found in ordered.items()}
    return native, evaluators


def _flow(top: Reader, given: dict[str, Any], context: Context) -> list[str] | None:
    """The names of the one flow of pass_flows; None if the file has none."""
    if not top.has("pass_flows"):
        return None
    report, flows = context.report, top.take("pass_flows", list, [])
    if len(flows) != 1 or not isinstance(flows[0], list):
        report.problem(
            "pass_flows",
            f"{len(flows)} flows are as many workflows; keep one flow, and write the others to files of their own",
        )
        return None
    for name in flows[0]:
        if name not in given:
            report.problem("pass_flows[0]", f"no pass is called {name!r}{did_you_mean(str(name), given)}")
    report.note("dropped", "pass_flows", "the passes stand in this order now")
    return [str(name) for name in flows[0]]


def _step(
    given: Any, place: str, at: tuple[str, ...], context: Context, evaluators: list[tuple[str, Any]]
) -> Step | None:
    """One pass, or one alternative of it; None, and a problem, if it is not of a type that there is."""
    report = context.report
    outer = report.open(given, place)
    if not outer.has("type"):
        report.problem(outer.path("type"), "this key is needed")
    found = outer.take("type", str, "")
    kind = known_type(found)
    if kind is None:
        if found:
            report.problem(outer.path("type"), refusal(found))
        outer.pass_over()
        return None
    if kind == "GenAIModelExporter":
        kind = "ModelBuilder"
        report.note("renamed", outer.path("type"), "is ModelBuilder now", (*at, "type"))
    values: dict[str, Any] = {"type": kind}
    host = system_reference(outer, "host", f"{at[1]}_host", context)
    if host is not None:
        values["host"] = host
    if outer.has("evaluator"):
        evaluators.append((outer.path("evaluator"), outer.take("evaluator")))
        report.note(
            "changed",
            outer.path("evaluator"),
            f"is {dotted(at)}.evaluate true now, by the one evaluator there is",
            (*at, "evaluate"),
        )
        values["evaluate"] = True
    disabled = bool(outer.take("disable_search", bool, False))
    if outer.has("disable_search"):
        report.note("dropped", outer.path("disable_search"), "only what stands as a space is searched")
    outer.drop("clean_run_cache", "a pass is made anew when something about it changes")
    outer.drop("output_name", "every pass's result is kept in the cache, the last one's in output_dir")
    keys = outer.flat("config")
    if kind in _TRAINING:
        values |= lora(kind, keys, at, context, disabled)
    elif kind in _OWN:
        values |= _OWN[kind](keys, at, context, disabled)
    merged = kind == "OnnxConversion" and keys.has(_MERGE) and keys.take(_MERGE, bool, False)
    if kind == "OnnxConversion" and keys.has(_MERGE):
        report.note(
            "dropped",
            keys.path(_MERGE),
            "a MergeAdapterWeights pass before it does it" if merged else "it is a pass of its own",
        )
    return Step(place, kind, values, bool(merged))


def _fold_rtn(steps: dict[str, list[Step]], context: Context) -> dict[str, list[Step]]:
    """`steps` with an Rtn pass right before a ModelBuilder of precision int4 made settings of it: the builder rounds by itself."""
    result: dict[str, list[Step]] = {}
    folded: Step | None = None
    names = list(steps)
    for name, following in zip(names, [*names[1:], ""], strict=False):
        found = steps[name]
        after = steps[following] if following else []
        if (
            len(found) == 1
            and found[0].kind == "Rtn"
            and after
            and all(s.kind == "ModelBuilder" and s.values.get("precision") == "int4" for s in after)
        ):
            folded = found[0]
            context.report.note(
                "changed",
                folded.place,
                f"is part of passes.{following} now, which rounds to int4 by itself",
                ("passes", str(following)),
            )
            continue
        if folded is not None:
            for step in found:
                step.values |= {k: folded.values[k] for k in ("block_size", "symmetric") if k not in step.values}
            folded = None
        result[name] = found
    return result


def _fold_extraction(steps: dict[str, list[Step]], context: Context) -> dict[str, list[Step]]:
    """`steps` with an export right before an ExtractAdapters made its precision: base and adapter are written apart from the start."""
    result: dict[str, list[Step]] = {}
    names = list(steps)
    for name, following in zip(names, [*names[1:], ""], strict=False):
        step, after = steps[name][0], steps[following] if following else []
        if step.kind in _BUILDING and after and all(s.kind == "ExtractAdapters" for s in after):
            text = f"is part of passes.{following} now, which writes base and adapter apart from the start"
            context.report.note("changed", step.place, text, ("passes", following))
            for one in after:
                one.values["precision"] = step.values.get("precision", "fp32")
        else:
            result[name] = steps[name]
    for one in [step for found in result.values() for step in found]:
        if one.kind == "ExtractAdapters" and "precision" not in one.values:
            text = "precision fp32: as in Olive, where extracting changes no weights"
            context.report.note("default", one.place, text)
            one.values["precision"] = "fp32"
    return result


def _merge_first(steps: dict[str, list[Step]], context: Context) -> dict[str, list[Step]]:
    """`steps` with a merge between training and an export that had none, and the base that each merge goes into."""
    result: dict[str, list[Step]] = {}
    adapter: Step | None = None
    for name, found in steps.items():
        kind = found[0].kind
        if kind in _BUILDING and adapter is not None:
            merge = context.free_name(_MERGE, {**steps, **result})
            text = (
                f"the adapter is merged first, by passes.{merge}; Olive kept it beside the base in the exported model"
            )
            if not found[0].merges:
                context.report.note("changed", found[0].place, text, ("passes", merge))
            result[merge] = [
                Step(found[0].place, "MergeAdapterWeights", _base(adapter, found[0].place, merge, context))
            ]
            adapter = None
        if kind in _TRAINING:
            adapter = found[0]
        elif kind == "MergeAdapterWeights":
            found[0].values |= _base(adapter, found[0].place, name, context)
            adapter = None
        result[name] = found
    return result


def _base(adapter: Step | None, place: str, name: str, context: Context) -> dict[str, Any]:
    """The keys of the merge of `adapter`: since the summer of 2024 Olive merged QLoRA's into the base in full precision."""
    values: dict[str, Any] = {"type": "MergeAdapterWeights"}
    if adapter is not None and adapter.kind == "QLoRA" and context.era.since(SUMMER):
        context.report.note(
            "default",
            place,
            f"base original: as in Olive {context.era.release}, into the base before it was quantized",
            ("passes", name, "base"),
        )
        values["base"] = "original"
    return values
