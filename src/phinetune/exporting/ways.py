"""Ways to integers, one interface: a model's folder in, `Codes` of its linear layers out, by name.

    default    the nearest codes, with ONNX Runtime's own scales: what its builder writes
    searched   the nearest codes for the scales that lose least
    gptq       searched scales, and rounding errors made up for by what is rounded later
    mixed      gptq, and 8 bits for the products whose rounding changes the answers most (`sensitivity.py`)

`searched` and `gptq` weigh errors by what comes into each layer on the examples of the training, if they are given; `gptq` needs them.
The model is a copy in memory and is used up. Its output layer, where it is the input embedding as well, is rounded first and for
both uses: all errors count alike. Weighing them by what comes into the output layer costs the embedding more than the output gains
(measured on the embedded model, tone task: held-out loss 0.025 without, 0.047 with, 0.030 before rounding), and so does gptq.

Not here: the arithmetic (`rounding_ways.py`), the graph (`codes.py`), which way is taken (`workflow.quantize`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from phinetune.events import Note, OnEvent, log_event
from phinetune.exporting.calibration import batches_of, quantize_in_order
from phinetune.exporting.rounding_ways import gptq, least_error
from phinetune.model.grid import Codes, Grid, join, quantize

Way = Literal["default", "searched", "gptq", "mixed"]


@torch.no_grad()
def codes_of(
    folder: Path,
    way: Way,
    grid: Grid,
    rows: Sequence[Sequence[int]] = (),
    kept: Sequence[str] = (),
    kept_as: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    on_event: OnEvent = log_event,
) -> dict[str, Codes]:
    """Codes of every linear layer of the plain model in `folder`, by the module's name.

    rows: token ids of examples, none for `default`. kept: modules that stay as they are. kept_as: the dtype of the graph's
    scales. Raises ConfigError where the blocks do not divide a layer's inputs, ValueError for `gptq` and `mixed` without examples. `mixed` gives
    those of `gptq`: which products get other bits is `raise_most_sensitive`'s.
    """
    from phinetune.model.load import load_model, measuring_plan

    if way in ("gptq", "mixed") and not rows:
        raise ValueError(f"{way} needs examples")
    model = load_model(folder, measuring_plan(folder, trust_remote_code))
    job = _Quantizing(model, way, grid, frozenset(kept), kept_as)
    job.shared_embedding()
    if rows and way != "default":
        quantize_in_order(model, batches_of(rows, _pad(model)), job.group, on_event)
    left = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in job.codes}
    for name, module in left.items():
        if name not in job.kept:
            job.put(name, module, job.alone(module))
    if rows and way != "default" and (unseen := set(left) - job.kept):
        on_event(Note(f"export: nothing comes into {len(unseen)} layers on the calibration data, as {min(unseen)}"))
    return job.codes


def _pad(model: Any) -> int:
    return int(model.config.pad_token_id or 0)


class _Quantizing:
    """A model on its way to integers."""

    def __init__(self, model: Any, way: Way, grid: Grid, kept: frozenset[str], kept_as: torch.dtype) -> None:
        self.model, self.way, self.grid, self.kept, self.kept_as = model, way, grid, kept, kept_as
        self.codes: dict[str, Codes] = {}

    def put(self, name: str, module: nn.Linear, codes: Codes) -> None:
        """Note the codes of one layer, and let it compute with them."""
        self.codes[name] = codes
        module.weight.data = codes.dense(module.weight.dtype)

    def alone(self, module: nn.Linear) -> Codes:
        """Codes of one layer whose inputs are not known, or do not count."""
        if self.way == "default":
            return quantize(module.weight, self.grid)
        return least_error(module.weight, self.grid, kept_as=self.kept_as)

    def shared_embedding(self) -> None:
        """Round the output layer first if it is the input embedding too."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if isinstance(head, nn.Linear) and head.weight is embedding.weight:
            name = next(n for n, m in self.model.named_modules() if m is head)
            if name not in self.kept:
                self.put(name, head, self.alone(head))

    def group(self, layers: dict[str, nn.Linear], moments: Tensor) -> None:
        """Quantize layers that have one input, whose X Xᵀ is `moments`."""
        wanted = {n: m for n, m in layers.items() if n not in self.kept and n not in self.codes}
        if not wanted:
            return
        weight = torch.cat([m.weight for m in wanted.values()])
        codes = (
            gptq(weight, moments, self.grid, self.kept_as)
            if self.way in ("gptq", "mixed")
            else least_error(weight, self.grid, moments.diagonal(), self.kept_as)
        )
        start = 0
        for name, module in wanted.items():
            self.put(name, module, codes[start : start + len(module.weight)])
            start += len(module.weight)


def joined(codes: dict[str, Codes], rows: Sequence[tuple[str, int, int]]) -> Codes | None:
    """The codes of a product of the graph from those of the modules that make up its rows; None if one of them has none."""
    if not all(module in codes for module, _, _ in rows):
        return None
    return join([codes[module][start:stop] for module, start, stop in rows])
