"""Write docs/cli.md, docs/config.md and docs/workflow.schema.json from the code; with --check, say whether they are current.

python docs/generate.py [--check]
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import typer

from phinetune.cli.app import app, main
from phinetune.data.messages import DataConfig
from phinetune.exporting.config import ExportConfig
from phinetune.lora.config import LoraConfig
from phinetune.model.fast import FastPaths
from phinetune.systems.config import AcceleratorConfig, SystemConfig
from phinetune.workflow.config import EvaluateConfig, ModelConfig, PackageConfig, SearchConfig, WorkflowConfig
from phinetune.workflow.passes import Pass
from phinetune.workflow.schema import field_docs, workflow_schema
from phinetune.workflow.stages import PASSES

DOCS = Path(__file__).parent
CONFIGS = (
    (
        DataConfig,
        "data",
        "`data` of `finetune` and `evaluate`, and `eval_data` of `finetune`: which rows, and how they become examples.",
    ),
    (LoraConfig, "peft_config", "`peft_config` of `finetune`: the names of PEFT's `LoraConfig`."),
    (ExportConfig, "export_config", "`export_config` of `export`: how the ONNX model is built."),
    (
        WorkflowConfig,
        "A workflow file",
        "The keys of a file for `run`. A JSON Schema for editors: [workflow.schema.json](workflow.schema.json).",
    ),
    (ModelConfig, "model in a workflow", "`model`, where it is more than a name."),
    (EvaluateConfig, "evaluate", "`evaluate`: what is measured, and on what."),
    (SearchConfig, "search", "`search`: how spaces are searched."),
    (SystemConfig, "systems", "An entry of `systems`: where work runs (see [systems](systems.md))."),
    (AcceleratorConfig, "accelerator", "`accelerator` of a system: what the result is for."),
    (PackageConfig, "package", "`package`: a zip file of the result."),
)
MARK = "<!-- Written by docs/generate.py; do not edit. -->\n"


def help_of(*args: str) -> str:
    """What `phinetune ARGS --help` prints, at a fixed width."""
    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    with redirect_stdout(text):
        main([*args, "--help"])
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def command_names() -> list[list[str]]:
    """The words of every command, those of groups included, in the order of the help."""
    names = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        names += [[name], *([name, inner] for inner in getattr(command, "commands", {}))]
    return names


def cli() -> str:
    """The page of commands."""
    parts = [MARK, "# Commands\n", f"```\n{help_of()}\n```\n"]
    parts += [f"## phinetune {' '.join(words)}\n\n```\n{help_of(*words)}\n```\n" for words in command_names()]
    return "\n".join(parts)


def default_text(field: dataclasses.Field[object]) -> str:
    """A field's default as a cell of the table."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return "its own defaults" if dataclasses.is_dataclass(value) else f"`{value!r}`"
    return "needed" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def table(cls: type) -> list[str]:
    """A row for each key of a config dataclass."""
    docs = field_docs(cls)
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        default = default_text(field)
        kind = str(field.type).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{kind}` | {default} | {docs[field.name]} |")
    return rows


def config() -> str:
    """The page of configuration keys."""
    switches = ", ".join(f"`{field.name}`" for field in dataclasses.fields(FastPaths))
    parts = [MARK, "# Configuration\n", INTRODUCTION.replace("{switches}", switches)]
    for cls, name, what in CONFIGS:
        parts += [f"## {name}\n\n{what}\n", *table(cls), ""]
    parts.append(f"## Passes\n\n{PASSES_INTRODUCTION}")
    by_config: dict[type, list[tuple[str, Pass]]] = {}
    for name, pass_ in PASSES.items():
        by_config.setdefault(pass_.config, []).append((name, pass_))
    for cls, passes in by_config.items():
        takes, gives = " or ".join(passes[0][1].takes), passes[0][1].gives
        title = ", ".join(name for name, _ in passes)
        if cls in [c for c, *_ in CONFIGS]:
            known = next(name for c, name, _ in CONFIGS if c is cls)
            parts += [f"### {title}\n\nFrom {takes} to {gives}. Its keys are those of [{known}](#{known}).\n"]
            continue
        flat = " The keys of [peft_config](#peft_config) may stand beside these." if passes[0][1].known else ""
        parts += [f"### {title}\n\nFrom {takes} to {gives}.{flat}\n", *table(cls), ""]
    return "\n".join(parts).rstrip() + "\n"


def schema() -> str:
    """The JSON Schema of workflow files, with phinetune's own passes."""
    return json.dumps(workflow_schema(PASSES), indent=2, ensure_ascii=False) + "\n"


PASSES_INTRODUCTION = """\
Every entry of `passes` may also have `type` (which pass; default: its name), `host` (the system where it runs), `evaluate` (score what it
leaves) and `user_script` (see [extending](extending.md)). Artifacts are of three kinds: `hf` (a model), `adapter`, `onnx`.
"""

INTRODUCTION = """\
A file for `--config` (YAML or JSON) holds the arguments of the function of the same name; options on the command line win over it, and
`--set key=value` wins over both.

```yaml
model: microsoft/Phi-3-mini-4k-instruct
data:
  path: phrases.jsonl
  prompt: "What is the tone of this phrase? {phrase}"
  completion: "{tone}"
training_config: {num_train_epochs: 3, learning_rate: 2e-4}
peft_config: {r: 16, lora_alpha: 32}
output_dir: adapter
```

`training_config` takes the names of `transformers.TrainingArguments`, also those of earlier years (`evaluation_strategy`,
`warmup_ratio`, `no_cuda`, ...), and a few of phinetune's own (see [concepts](concepts.md)):

| key | values |
| --- | --- |
| `layout` | `auto`, `padded`, `tree` |
| `train_sampling_strategy` | `auto`, `random`, `sequential`, `group_by_length`, `group_by_prefix` |
| `checkpoint_layers` | how many layers compute their activations again instead of keeping them, or `all` |
| `fast_paths` | `false`, or switches: {switches} |
| `reference` | `true`: no fast path at all, padded batches |
| `keep_freed_memory` | `false` gives freed blocks back to the system at once |
| `skip_memory_check` | `true` trains even if the plan says that memory is not enough |

Batch size, number of epochs, learning rate, warm-up, logging and checkpoint intervals are derived from the run where they are not given,
and printed.
`model_kwargs` takes the names of `from_pretrained`: `torch_dtype`, `attn_implementation`, `device_map`, `trust_remote_code`,
`revision`, `token`, and fields of the model's config.
"""


def run(check: bool) -> int:
    """Write the pages, or compare them; the exit code."""
    stale = 0
    for name, text in (("cli.md", cli()), ("config.md", config()), ("workflow.schema.json", schema())):
        file = DOCS / name
        if check and (not file.exists() or file.read_text(encoding="utf-8") != text):
            print(f"{file} is stale: run make docs")
            stale = 1
        elif not check:
            file.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(run("--check" in sys.argv))
