"""A first workflow file for a model and a data file: every key it has is explained, and it runs as it stands.

The first rows of the data say which templates are needed, or show what they could be, and which metric fits. Not here: writing the
file (`phinetune init`), and reading it back (`config.py`).
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, Literal

from phinetune.data.messages import DataConfig, find_shape, parse_data_config
from phinetune.data.records import Record, data_file, read_records
from phinetune.errors import ConfigError, DataError

Goal = Literal["int4", "model", "adapter"]
"""What the workflow ends with: a 4-bit ONNX model, a merged model, or the adapter alone."""
_ROWS_READ = 50
_SHORT_ANSWER = 5  # words: up to here answers are compared as they are
_USUAL_ANSWERS = (
    "answer", "completion", "response", "output", "target", "label", "class", "category", "tone", "sentiment", "emotion", "intent",
    "topic", "summary", "translation", "reply", "title",
)  # fmt: skip


def starting_file(
    model: str, data: str, prompt: str | None = None, completion: str | None = None, goal: Goal = "int4"
) -> str:
    """The YAML text of a workflow that fine-tunes `model` on the rows of `data`.

    prompt, completion: column templates. Without them they are read from the rows' fields, or guessed with a remark. Raises DataError
    for a file that cannot be read or rows that the templates do not fit, ConfigError where nothing can be guessed.
    """
    given = {key: value for key, value in (("prompt", prompt), ("completion", completion)) if value is not None}
    config = parse_data_config({"path": data, **given})
    rows = list(itertools.islice(read_records(data_file(config.path)), _ROWS_READ))
    remark, templates = _templates(rows[0], config)
    found = parse_data_config({"path": data, **templates})
    exact = _average_words(rows, found) <= _SHORT_ANSWER
    lines = [
        "# A workflow of phinetune. Run it with: phinetune run THIS_FILE",
        "# Any key can be changed for one run: --set passes.lora.r=8",
        "",
        "# A model folder, a hub id (owner/name), or an embedded model (smollm2-135m).",
        f"model: {_text(model)}",
        "",
        *remark,
        "data:",
        f"  path: {_text(data)}",
        *[f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in templates.items()],
        "  test_fraction: 0.2  # share of the rows that is held out and scored; equal prompts fall on the same side",
        "",
        "# What happens, in this order. Where a value stands, a space to search over may stand: {choices: [8, 16, 32]}, or",
        "# {low: 1e-4, high: 1e-3, log: true}; a list of passes under one name stands for alternatives.",
        "passes:",
        "  lora:",
        "    type: LoRA  # or DoRA; QLoRA and LoftQ hold the base model in 4 bits",
        "    r: 16  # rank of the adapter",
        "    lora_alpha: 32  # its product is scaled by lora_alpha / r",
        "    training_config:  # the names of transformers.TrainingArguments",
        "      num_train_epochs: 3",
        "      # learning_rate: 5e-4  # derived from the model if left out, like the batch size",
        *_ending(goal),
        "",
        "# What is measured on the held-out rows: exact_match, accuracy, f1, stop_rate, loss, perplexity, latency_p50, throughput_avg,",
        "# size, memory, ...",
        "evaluate:",
        f"  metrics: [{'exact_match' if exact else 'perplexity'}, size]",
        "",
        "# What must hold of the result, and what is to be improved; base is the same metric of the model that goes in.",
        f"# constraints: [{'exact_match >= 0.9' if exact else 'perplexity <= base * 0.8'}, size <= 200 MB]",
        f"# objectives: [{'max exact_match' if exact else 'min perplexity'}, min size]",
        "# search: {trials: 12}  # needed as soon as there is a space",
        "",
        "# The chosen model (model/), results.json, footprint.json and the log go here.",
        "output_dir: phinetune-run",
    ]
    return "\n".join(lines) + "\n"


def _ending(goal: Goal) -> list[str]:
    merge = ["  merge:", "    type: MergeAdapterWeights  # the adapter folded into the base model"]
    build = [
        "  int4:",
        "    type: ModelBuilder  # an ONNX model for ONNX Runtime GenAI, verified",
        "    precision: int4  # or int8, fp16, fp32",
        "    block_size: 32  # weights that share one scale; 16 to 256, larger is smaller on disk",
    ]
    return {"adapter": [], "model": merge, "int4": merge + build}[goal]


def _templates(first: Record, config: DataConfig) -> tuple[list[str], dict[str, str]]:
    """(comment lines, templates to write) for data with this first row."""
    if config.prompt is not None and config.completion is not None:
        _fits(first, config)
        return ["# Which file, and how a row becomes a question and an answer: {name} stands for a field."], {
            "prompt": config.prompt,
            "completion": config.completion,
        }
    try:
        find_shape(first, config)
    except DataError:
        return _guess(first, config)
    _fits(first, config)
    names = ", ".join(_shown(name) for name in first.fields)
    return [f"# Which file. Its rows ({names}) are conversations of a known shape; templates are not needed."], {}


def _fits(first: Record, config: DataConfig) -> None:
    """Raises DataError if the first row is none that can be learned from."""
    try:
        find_shape(first, config)(first.fields)
    except ValueError as error:
        raise DataError(f"{first.place}: {error}") from None


def _guess(first: Record, config: DataConfig) -> tuple[list[str], dict[str, str]]:
    """Question and answer by the fields' names and lengths, with a remark that it is a guess."""
    texts = {
        name: str(v) for name, v in first.fields.items() if isinstance(v, str | int | float) and not isinstance(v, bool)
    }
    texts = {name: v for name, v in texts.items() if name and not re.search(r"[{}.\[\]()!:]", name)}
    if len(texts) < 2:
        raise ConfigError(
            f"{config.path}: which of its fields is the question and which the answer? (found: {', '.join(map(_shown, first.fields)) or 'none'})",
            'say it with --prompt "What is ...? {field}" --completion "{other}"',
        )
    answer = next((n for usual in _USUAL_ANSWERS for n in texts if n.lower() == usual), list(texts)[-1])
    question = max((n for n in texts if n != answer), key=lambda n: len(texts[n]))
    remark = [
        "# Which file, and how a row becomes a question and an answer: {name} stands for a field.",
        f"# GUESSED from the fields {', '.join(map(_shown, first.fields))}: look whether this is what the model shall be asked and shall answer,",
        '# and say what it is to do, such as "What is the tone of this phrase? {phrase}".',
    ]
    return remark, {"prompt": f"{{{question}}}", "completion": f"{{{answer}}}"}


def _average_words(rows: list[Record], config: DataConfig) -> float:
    """Mean length of the first rows' answers; rows that do not fit are left to the training, which names them."""
    shape, counts = find_shape(rows[0], config), []
    for row in rows:
        try:
            counts.append(len(shape(row.fields)[-1]["content"].split()))
        except ValueError:
            continue
    return sum(counts) / len(counts) if counts else 0.0


def _shown(name: Any) -> str:
    """A field's name in a comment, on one line whatever it holds."""
    return str(name) if str(name).isprintable() else repr(name)


def _text(value: str) -> str:
    """`value` as YAML: plain where that is safe."""
    plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and value.lower() not in (
        "y",
        "n",
        "yes",
        "no",
        "on",
        "off",
        "true",
        "false",
        "null",
        ".",
    )
    number = re.fullmatch(r"[.\d][\d_]*([eE][-+]?\d+)?|\.(inf|nan)", value, re.IGNORECASE)
    return value if plain and not number else json.dumps(value, ensure_ascii=False)
