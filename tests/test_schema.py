"""The schema of workflow files agrees with the parser: what the one takes, the other takes; typos neither."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from phinetune.cli.app import main
from phinetune.config import read_yaml
from phinetune.errors import ConfigError
from phinetune.lora.config import parse_lora_config
from phinetune.workflow.config import RESERVED, parse_workflow
from phinetune.workflow.passes import find_pass, parse_pass, pass_table
from phinetune.workflow.schema import workflow_schema
from phinetune.workflow.spaces import fill, find_spaces
from phinetune.workflow.stages import PASSES

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = workflow_schema(PASSES)

PLAIN: dict[str, Any] = {"model": "m", "data": "tone", "passes": {"lora": {"type": "LoRA", "r": 8}}}
GOOD = {
    "plain": "{model: m, data: tone, passes: {lora: {type: LoRA}}}",
    "with its schema": "{$schema: x.json, model: m, data: tone, passes: {lora: {type: LoRA}}}",
    "any case": "{model: m, data: tone, passes: {a: {type: lora, r: 4}, b: {type: MERGEadapterweights}}}",
    "type by name": "{model: m, data: tone, passes: {LoRA: {r: 4}, MergeAdapterWeights: null}}",
    "model as a group": "{model: {path: m, model_kwargs: {torch_dtype: bfloat16}}, data: tone, passes: {a: {type: QLoRA, quant_type: fp4}}}",
    "data config": "{model: m, data: {path: d.jsonl, prompt: '{a}', completion: '{b}'}, passes: {a: {type: LoRA}}}",
    "several data": "{model: m, data: {train: d.jsonl, test: {path: e.jsonl}}, passes: {a: {type: LoRA, data: train, eval_data: test}}}",
    "spaces": "{model: m, data: tone, passes: {a: {type: LoRA, r: {choices: [2, 4]}, lora_dropout: {low: 0.0, high: 0.2},"
    " training_config: {learning_rate: {low: 1e-4, high: 1e-3, log: true}}, target_modules: {choices: [all-linear, [q_proj]]},"
    " rank_pattern: {q_proj: {choices: [2, 4]}}}}, search: {trials: 3}, objectives: [max exact_match]}",
    "alternatives": "{model: m, data: tone, passes: {a: [{type: LoRA}, {type: DoRA, r: 4}]}, search: {sampler: random}}",
    "builder": "{model: m, passes: {a: {type: ModelBuilder, precision: {choices: [int4, fp16]}, block_size: {choices: [32, 64]}}}}",
    "goals": "{model: m, data: tone, passes: {a: {type: LoRA}}, evaluate: {metrics: [size]}, constraints: [size <= 1 MB], seed: 1}",
    "systems": "{model: m, data: tone, passes: {a: {type: LoRA, host: p}}, systems: {p: {type: python, python: /x}}, target: local}",
    "peft group": "{model: m, data: tone, passes: {a: {type: LoRA, peft_config: {r: 8}}}, package: {name: x}}",
    "nulls": "{model: m, data: null, passes: {a: {type: Rtn, host: null}}, search: null, evaluate: null}",
}
BAD = {
    "no model": "{data: tone, passes: {lora: {type: LoRA}}}",
    "no passes": "{model: m, data: tone}",
    "empty passes": "{model: m, data: tone, passes: {}}",
    "empty alternatives": "{model: m, data: tone, passes: {a: []}}",
    "top typo": "{model: m, data: tone, passess: {lora: {type: LoRA}}}",
    "second top typo": "{model: m, data: tone, passes: {lora: {type: LoRA}}, objective: [min size]}",
    "model typo": "{model: {pth: m}, data: tone, passes: {lora: {type: LoRA}}}",
    "data typo": "{model: m, data: {path: d.jsonl, promt: '{a}'}, passes: {lora: {type: LoRA}}}",
    "named data typo": "{model: m, data: {train: {path: d.jsonl, promt: '{a}'}}, passes: {lora: {type: LoRA}}}",
    "data is a list": "{model: m, data: [d.jsonl], passes: {lora: {type: LoRA}}}",
    "unknown pass": "{model: m, data: tone, passes: {lora: {type: LoRE}}}",
    "pass is a text": "{model: m, data: tone, passes: {lora: LoRA}}",
    "pass typo": "{model: m, data: tone, passes: {lora: {type: LoRA, alhpa: 3}}}",
    "key of another pass": "{model: m, data: tone, passes: {lora: {type: LoRA, block_size: 32}}}",
    "typo in an alternative": "{model: m, data: tone, passes: {lora: [{type: LoRA}, {type: dora, rr: 3}]}, search: {}}",
    "wrong type": "{model: m, data: tone, passes: {lora: {type: LoRA, r: many}}}",
    "wrong choice": "{model: m, passes: {a: {type: ModelBuilder, precision: int3}}}",
    "wrong choice in a space": "{model: m, passes: {a: {type: Rtn, block_size: {choices: [32, 33]}}}, search: {}}",
    "empty space": "{model: m, data: tone, passes: {a: {type: LoRA, r: {choices: []}}}, search: {}}",
    "choice twice": "{model: m, data: tone, passes: {a: {type: LoRA, r: {choices: [8, 8]}}}, search: {}}",
    "half a range": "{model: m, data: tone, passes: {a: {type: LoRA, r: {low: 4}}}, search: {}}",
    "space of data": "{model: m, data: {a: tone, b: tone}, passes: {l: {type: LoRA, data: {choices: [a, b]}}}, search: {}}",
    "needed key": "{model: m, passes: {a: {type: TruncateAdapter}}}",
    "evaluate typo": "{model: m, data: tone, passes: {a: {type: LoRA}}, evaluate: {metric: [size]}}",
    "search choice": "{model: m, data: tone, passes: {a: {type: LoRA}}, search: {sampler: grid}}",
    "host is no name": "{model: m, data: tone, passes: {a: {type: LoRA, host: 3}}}",
    "system typo": "{model: m, data: tone, passes: {a: {type: LoRA}}, systems: {p: {type: docker, imag: x}}}",
    "constraints is a text": "{model: m, data: tone, passes: {a: {type: LoRA}}, constraints: size <= 1 MB}",
}


def schema_takes(values: Any) -> bool:
    return not list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(values))


def parser_takes(values: Any) -> bool:
    """True if the file is read, and each pass reads its keys, with the first value of each space."""
    try:
        _, entries = parse_workflow(copy.deepcopy(values))
        for entry in entries:
            problems: list[str] = []
            spaces = find_spaces(entry.values, entry.path, problems)
            if problems:
                raise ConfigError(problems)
            for index in (0, -1):
                chosen = {space.path: space.examples()[index] for space in spaces}
                if any(path.rsplit(".", 1)[-1] in ("data", "eval_data") for path in chosen):
                    raise ConfigError("cannot be searched over")
                config = parse_pass(entry, find_pass(entry, pass_table()), fill(entry.values, entry.path, chosen))
                parse_lora_config(getattr(config, "peft_config", {}))
    except ConfigError:
        return False
    return True


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize("name", GOOD)
def test_good_files_are_taken_by_both(name: str) -> None:
    values = read_yaml(GOOD[name], name)
    errors = [e.message for e in jsonschema.Draft202012Validator(SCHEMA).iter_errors(values)]
    assert not errors and parser_takes(values)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_both(name: str) -> None:
    values = read_yaml(BAD[name], name)
    assert not schema_takes(values) and not parser_takes(values)


@pytest.mark.parametrize("pass_name", PASSES)
def test_every_key_of_every_pass_is_there_with_its_meaning(pass_name: str) -> None:
    found = SCHEMA["$defs"][f"pass.{pass_name}"]
    assert found["additionalProperties"] is False and set(RESERVED) < set(found["properties"])
    for key, value in found["properties"].items():
        if key not in RESERVED and "$ref" in value:
            value = SCHEMA["$defs"][value["$ref"].removeprefix("#/$defs/")]
        assert key == "type" or value.get("description"), key
    values: Any = copy.deepcopy(PLAIN)
    values["passes"] = {"p": {"type": pass_name, "no_such_key": 1}}
    assert not schema_takes(values) and not parser_takes(values)


def test_a_script_may_add_passes_and_any_keys() -> None:
    assert schema_takes({**PLAIN, "passes": {"p": {"type": "Mine", "user_script": "mine.py", "anything": [1]}}})


def test_the_command_prints_what_is_installed_or_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["$defs"].keys() >= SCHEMA["$defs"].keys()
    assert main(["schema", "-o", str(tmp_path / "new" / "s.json")]) == 0
    assert json.loads((tmp_path / "new" / "s.json").read_text()) == printed
