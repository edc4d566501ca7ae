"""The JSON Schema of a workflow file, for editors: completion, help texts, and a red line under a typo.

Made from the dataclasses and the table of passes, so that it says what the parser says. A value of a pass may be a space instead. The
schema knows keys, types and choices; what depends on several keys, on files or on numbers' sizes, the parser alone checks. Values that
pydantic would convert ("8" for 8) the schema refuses.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

from phinetune.data.messages import DataConfig
from phinetune.lora.config import LoraConfig
from phinetune.workflow.config import WorkflowConfig
from phinetune.workflow.passes import NO_SPACE, Pass, pass_table

Schema = dict[str, Any]
_RESERVED: Schema = {
    "type": {"type": "string", "description": "Which pass; default: its name here."},
    "host": {"type": ["string", "null"], "description": "Name of the system where it runs; default: the workflow's."},
    "evaluate": {"type": ["boolean", "null"], "description": "Score what this pass leaves."},
    "user_script": {
        "type": ["string", "null"],
        "description": "Python file whose PASSES are used beside phinetune's own.",
    },
}


def workflow_schema(passes: Mapping[str, Pass] | None = None) -> Schema:
    """The schema (JSON Schema 2020-12) of a native workflow file with these `passes`; default: all that are installed."""
    passes = pass_table() if passes is None else passes
    schema = _of_class(WorkflowConfig, "#/$defs/{model}")
    definitions: Schema = schema.pop("$defs")
    definitions["DataConfig"] = _data_config(definitions)
    for name, pass_ in passes.items():
        definitions[f"pass.{name}"] = _of_pass(name, pass_, definitions)
    definitions["pass"] = _any_pass(list(passes))
    properties = schema["properties"]
    properties["model"] = {
        **_documented(properties["model"]),
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/ModelConfig"}],
    }
    properties["data"] = {**_documented(properties["data"]), **_data()}
    one = {"$ref": "#/$defs/pass"}
    properties["passes"] = {
        **_documented(properties["passes"]),
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"anyOf": [one, {"type": "array", "minItems": 1, "items": one}]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "phinetune workflow",
        **{k: v for k, v in schema.items() if k != "properties"},
        "properties": {"$schema": {"type": "string"}, **properties},
        "$defs": dict(sorted(definitions.items())),
    }


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the string under it in the source of a dataclass; nothing where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    docs = {}
    for field, below in itertools.pairwise(getattr(tree, "body", [])):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return docs


def _of_class(cls: type, references: str) -> Schema:
    """The schema of a dataclass; an open object for one whose types JSON cannot hold."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    try:
        found: Schema = _untitled(TypeAdapter(cls).json_schema(ref_template=references))
    except PydanticUserError:
        names = [f.name for f in dataclasses.fields(cls)]
        return {"type": "object", "properties": {name: {} for name in names}, "additionalProperties": False}
    for name, text in field_docs(cls).items():
        if name in found["properties"]:
            found["properties"][name]["description"] = text
    return found


def _untitled(schema: Any) -> Any:
    """`schema` without the titles that pydantic makes of names; a property called title stays."""
    if isinstance(schema, list):
        return [_untitled(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {k: _untitled(v) for k, v in value.items()} if key in ("properties", "$defs") else _untitled(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


def _documented(schema: Schema) -> Schema:
    return {"description": schema["description"]} if "description" in schema else {}


def _data_config(definitions: Schema) -> Schema:
    """DataConfig's schema, under the name by which the workflow's refers to it."""
    found = _of_class(DataConfig, "#/$defs/{model}")
    definitions.update(found.pop("$defs", {}))
    return found


def _data() -> Schema:
    """A file, one data config (known by its path), or several of both by name."""
    one = {"$ref": "#/$defs/DataConfig"}
    return {
        "type": ["string", "object", "null"],
        "if": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
        "then": one,
        "else": {"additionalProperties": {"anyOf": [{"type": "string"}, one]}},
    }


def _of_pass(name: str, pass_: Pass, definitions: Schema) -> Schema:
    """The keys of one pass beside the ones that every entry has, each value or a space of it."""
    found = _of_class(pass_.config, f"#/$defs/{name}.{{model}}")
    definitions.update({f"{name}.{inner}": value for inner, value in found.pop("$defs", {}).items()})
    properties: Schema = dict(found.get("properties", {}))
    flat: Schema = {}
    if pass_.known:
        flat = _of_class(LoraConfig, "#/$defs/{model}")["properties"]
        definitions.update({f"LoraConfig.{key}": _or_space(value) for key, value in flat.items()})
        flat = {key: {"$ref": f"#/$defs/LoraConfig.{key}"} for key in pass_.known if key in flat}
    own = {key: value if key in NO_SPACE else _or_space(value) for key, value in properties.items()}
    own = {**flat, **own}
    strict = found.get("additionalProperties") is False
    return {
        **_documented(found),
        "type": "object",
        "properties": {**_RESERVED, **own},
        **({"required": found["required"]} if found.get("required") else {}),
        **({"additionalProperties": False} if strict else {}),
    }


def _or_space(schema: Schema) -> Schema:
    """`schema`, or a space of such values; in a group of keys, for each value."""
    outer: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    inner: Schema = {key: value for key, value in schema.items() if key not in outer}
    if inner.get("type") == "object":
        each = inner.get("additionalProperties")
        return {**outer, **inner, **({"additionalProperties": _or_space(each)} if isinstance(each, dict) else {})}
    choices = {
        "type": "object",
        "properties": {"choices": {"type": "array", "minItems": 1, "uniqueItems": True, "items": inner}},
        "required": ["choices"],
        "additionalProperties": False,
    }
    return {**outer, "anyOf": [inner, choices, *([_RANGE] if _is_number(inner) else [])]}


_RANGE: Schema = {
    "type": "object",
    "properties": {
        "low": {"type": "number"},
        "high": {"type": "number"},
        "log": {"type": "boolean"},
        "step": {"type": ["number", "null"], "exclusiveMinimum": 0},
    },
    "required": ["low", "high"],
    "additionalProperties": False,
}


def _is_number(schema: Schema) -> bool:
    return schema.get("type") in ("integer", "number") or any(_is_number(s) for s in schema.get("anyOf", []))


def _any_pass(names: list[str]) -> Schema:
    """An entry: the keys that belong to its type, in any case; anything where its type is not written, or a script adds passes."""
    typed = [
        {
            "if": {"properties": {"type": {"type": "string", "pattern": f"^{_any_case(name)}$"}}, "required": ["type"]},
            "then": {"$ref": f"#/$defs/pass.{name}"},
        }
        for name in names
    ]
    known = {"anyOf": [{"enum": names}, {"pattern": f"^({'|'.join(map(_any_case, names))})$"}]}
    return {
        "type": ["object", "null"],
        "properties": _RESERVED,
        "if": {"properties": {"user_script": {"type": "string"}}, "required": ["user_script"]},
        "else": {"properties": {"type": known}, "allOf": typed},
    }


def _any_case(name: str) -> str:
    """A regular expression for `name` in any case, without flags, which JSON Schema has none of."""
    return "".join(
        f"[{c.upper()}{c.lower()}]" if c.isalpha() else f"\\{c}" if not c.isalnum() and c != "_" else c for c in name
    )
