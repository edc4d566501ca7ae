"""The weights of a base model as they are on disk, by the names that its layers have in memory: what LoftQ compares 4 bits with.

One tensor is read at a time. Not here: what is done with it (`phinetune.lora.start`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from phinetune.errors import ModelError
from phinetune.model.folder import weight_files

if TYPE_CHECKING:
    import torch


class OriginalWeights:
    """Layer's name -> its weight on disk, (out, in), in the dtype that it has there. `base` is a model's folder."""

    def __init__(self, base: Path) -> None:
        from phinetune.lora.shards import Layout

        self.base, self.layout = base, Layout(weight_files(base)[0])
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        self.model_type = str(config.get("model_type") or "")

    def __call__(self, name: str) -> torch.Tensor:
        """The weight of the layer called `name`. Raises ModelError if the files hold it under no such name, or not as numbers."""
        from phinetune.lora.changes import is_stored_transposed
        from phinetune.lora.plan import stored_name
        from phinetune.lora.shards import DTYPES

        stored = stored_name(f"{name}.weight", self.layout)
        if stored is None or self.layout.entry(stored)["dtype"] not in DTYPES:
            raise ModelError(
                f"{self.base}: its files hold no floating point weight for {name}, which init_lora_weights: loftq needs",
                "use another init_lora_weights for this model",
            )
        weight = self.layout.read(stored)
        return weight.t().contiguous() if is_stored_transposed(name, self.model_type) else weight
