"""What every stack trains on: batches of rows from one file, drawn with one seed, encoded once.

`short8` and `short16` are single phrases and their tones, in batches of 8 and 16. `long` are conversations of about 600 tokens in batches
of 4: 22 numbered phrases in, 22 numbered tones out, each conversation with phrases of its own, so that two have only the chat
template's head in common. Rows are drawn in shuffled passes over the file. Not here: who trains on them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.data.examples import load_examples
from phinetune.data.messages import parse_data_config
from phinetune.data.records import data_file, read_records
from phinetune.model.load import load_base_contract

PHRASES = 22
"""Phrases in one conversation of `long`."""


@dataclass(frozen=True)
class Workload:
    """Name, examples a step, phrases an example, and what README calls it."""

    name: str
    batch: int
    phrases: int
    title: str


WORKLOADS = {
    w.name: w
    for w in (
        Workload("short8", 8, 1, "short, batch 8"),
        Workload("short16", 16, 1, "short, batch 16"),
        Workload("long", 4, PHRASES, "long, batch 4"),
    )
}


def conversations(file: str, phrases: int, seed: int) -> Iterator[dict[str, str]]:
    """Endless rows of `prompt` and `completion` from a file (or bundled set) with the columns phrase and tone."""
    records = [record.fields for record in read_records(data_file(file))]
    if not records or any(not {"phrase", "tone"} <= set(row) for row in records):
        raise SystemExit(f"{file}: every row needs the columns phrase and tone")
    drawing = random.Random(seed)

    def drawn() -> Iterator[dict[str, Any]]:
        while True:
            yield from drawing.sample(records, len(records))

    rows = drawn()
    while True:
        chosen = [next(rows) for _ in range(phrases)]
        if phrases == 1:
            prompt, completion = f"What is the tone of this phrase? {chosen[0]['phrase']}", str(chosen[0]["tone"])
        else:
            prompt = "\n".join(f"{i}. {row['phrase']}" for i, row in enumerate(chosen, 1))
            completion = "\n".join(f"{i}. {row['tone']}" for i, row in enumerate(chosen, 1))
        yield {"prompt": prompt, "completion": completion}


def write_rows(workload: Workload, steps: int, file: str, model: Path, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Writes the rows of `steps` steps to `folder` and returns them encoded: input_ids, labels (-100 where masked).

    `rows.jsonl` holds text for the stack that encodes by itself, `examples.json` token ids for the others.
    """
    rows = conversations(file, workload.phrases, seed)
    chosen = [next(rows) for _ in range(workload.batch * steps)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    config = parse_data_config({"path": str(folder / "rows.jsonl"), "test_fraction": 0.0})
    train, _, _ = load_examples(config, load_base_contract(model), lambda event: None)
    if len(train) != len(chosen):
        raise SystemExit(f"{workload.name}: {len(chosen) - len(train)} rows are too long for the model's context")
    examples = [{key: list(row[key]) for key in ("input_ids", "labels")} for row in train]
    (folder / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    return examples
