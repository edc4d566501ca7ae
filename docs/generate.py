"""Write docs/cli.md and docs/config.md from the code; with --check, say whether they are current.

python docs/generate.py [--check]
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import itertools
import os
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

from phinetune.cli.app import main
from phinetune.data.messages import DataConfig
from phinetune.exporting.config import ExportConfig
from phinetune.lora.config import LoraConfig
from phinetune.systems.config import AcceleratorConfig, SystemConfig

DOCS = Path(__file__).parent
COMMANDS = ("finetune", "evaluate", "merge", "export", "chat", "quickstart", "info")
CONFIGS = (
    (DataConfig, "data", "`data` of `finetune` and `evaluate`: which file, and how a row becomes a conversation."),
    (LoraConfig, "peft_config", "`peft_config` of `finetune`: the names of PEFT's `LoraConfig`."),
    (ExportConfig, "export_config", "`export_config` of `export`: how the ONNX model is built."),
    (SystemConfig, "a system", "Where work runs (see [systems](systems.md))."),
    (AcceleratorConfig, "accelerator", "`accelerator` of a system: what the result is for."),
)
MARK = "<!-- Written by docs/generate.py; do not edit. -->\n"


def help_of(*args: str) -> str:
    """What `phinetune ARGS --help` prints, at a fixed width."""
    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    with redirect_stdout(text):
        main([*args, "--help"])
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def cli() -> str:
    """The page of commands."""
    parts = [MARK, "# Commands\n", f"```\n{help_of()}\n```\n"]
    parts += [f"## phinetune {name}\n\n```\n{help_of(name)}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the string under it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[ast.unparse(field.target)] = str(below.value.value)
    return docs


def default_text(field: dataclasses.Field[object]) -> str:
    """A field's default as a cell of the table."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return "its own defaults" if dataclasses.is_dataclass(value) else f"`{value!r}`"
    return "needed" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def config() -> str:
    """The page of configuration keys."""
    parts = [MARK, "# Configuration\n", INTRODUCTION]
    for cls, name, what in CONFIGS:
        docs = field_docs(cls)
        parts.append(f"## {name}\n\n{what}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |")
        for field in dataclasses.fields(cls):
            default = default_text(field)
            kind = str(field.type).replace("|", "\\|")
            parts.append(f"| `{field.name}` | `{kind}` | {default} | {docs[field.name]} |")
        parts.append("")
    return "\n".join(parts)


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
`warmup_ratio`, `no_cuda`, ...), and `layout`: `auto`, `padded` or `tree` (see [concepts](concepts.md)). Batch size, number of epochs,
learning rate, warm-up, logging and checkpoint intervals are derived from the run where they are not given, and printed.
`model_kwargs` takes the names of `from_pretrained`: `torch_dtype`, `attn_implementation`, `device_map`, `trust_remote_code`,
`revision`, `token`, and fields of the model's config.
"""


def run(check: bool) -> int:
    """Write both pages, or compare them; the exit code."""
    stale = 0
    for name, text in (("cli.md", cli()), ("config.md", config())):
        file = DOCS / name
        if check and (not file.exists() or file.read_text(encoding="utf-8") != text):
            print(f"{file} is stale: run make docs")
            stale = 1
        elif not check:
            file.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(run("--check" in sys.argv))
