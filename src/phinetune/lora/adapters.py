"""Several adapters on one base model: load, name, switch, disable, combine, delete. The base is held once, whatever their number.

Switching puts other layers, over the same frozen weights, into the model's tree: assignments, no arithmetic, no copy. Not here: files,
merging.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from phinetune.errors import AdapterError, ConfigError, did_you_mean
from phinetune.events import OnEvent, log_event
from phinetune.lora.adapter import load_adapter_state, make_adapter, read_adapter, save_adapter
from phinetune.lora.config import LoraConfig, as_pattern
from phinetune.lora.injection import Adapter, build_adapter, check_loftq
from phinetune.lora.peft_format import PREFIX, entries
from phinetune.lora.start import Original
from phinetune.lora.targets import find_targets
from phinetune.lora.truncation import low_rank


class Adapters:
    """Adapters for `model` by name; at most one is in at a time.

    `names` in the order they came; `active` is the name of the one that is in, or None. A model that is in use as it is can be given:
    nothing in it changes until an adapter is used. Then it is frozen; without one it computes exactly what it did.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        self._adapters: dict[str, Adapter] = {}

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order they came."""
        return list(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise AdapterError(f'no adapter is called "{name}"{did_you_mean(name, self._adapters)}', f"loaded: {known}")
        return self._adapters[name]

    def load(self, name: str, folder: str | Path, base_key: str | None = None) -> Adapter:
        """The adapter in `folder`, under `name`, not yet in use. Raises AdapterError as `load_adapter`, or if the name is taken."""
        self._check_free(name)
        with self.disabled():
            self._adapters[name] = make_adapter(self.model, read_adapter(folder), Path(folder), base_key)
        return self._adapters[name]

    def add(
        self, name: str, config: LoraConfig, original: Original | None = None, on_event: OnEvent = log_event
    ) -> Adapter:
        """A fresh adapter under `name`, not yet in use. Arguments and errors as `inject`'s; AdapterError if the name is taken."""
        self._check_free(name)
        with self.disabled():
            targets = find_targets(self.model, config, on_event=on_event)
            check_loftq(self.model, config, targets, original, on_event)
            adapter = build_adapter(self.model, config, targets, original)
        self._adapters[name] = adapter
        return adapter

    def use(self, name: str | None) -> None:
        """Put the adapter called `name` in; None leaves the plain base model."""
        wanted = None if name is None else self[name]
        if self.active is not None:
            self._adapters[self.active].take_out(self.model)
            self.active = None
        if wanted is not None:
            wanted.put(self.model)
        self.active = name

    @contextlib.contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The plain base model inside the `with`; afterwards the adapter that was in is in again, also after an error."""
        before = self.active
        self.use(None)
        try:
            yield self.model
        finally:
            self.use(before)

    def delete(self, name: str) -> None:
        """Forget an adapter; one that is in is taken out first."""
        self[name]
        if self.active == name:
            self.use(None)
        del self._adapters[name]

    def save(
        self, name: str, folder: str | Path, base_model: str = "", base_key: str | None = None, split: bool = False
    ) -> None:
        """Write an adapter as PEFT's files, as `save_adapter`."""
        save_adapter(self[name], folder, base_model, base_key, split)

    def combine(
        self,
        name: str,
        weights: dict[str, float],
        method: Literal["linear", "svd"] = "linear",
        rank: int | None = None,
    ) -> Adapter:
        """A new adapter `name` whose change to every weight is the weighted sum of the others' changes.

        "linear" is exact: the factors are put side by side, so the ranks add up (what PEFT calls "cat"; its own "linear" adds the
        factors themselves, which is another function). "svd" is the best approximation of that sum with `rank` (default: the largest
        of the ranks; Eckart and Young 1936). Raises AdapterError for adapters with anything but factors: DoRA's lengths, trained
        modules or biases do not add up; ConfigError for a rank that does not fit.
        """
        self._check_free(name)
        if not weights or not all(isinstance(w, int | float) and math.isfinite(w) for w in weights.values()):
            raise ConfigError(f"weights: one finite number for each adapter (found: {weights!r})")
        if method not in ("linear", "svd"):
            raise ConfigError(f'method: must be "linear" or "svd" (found: {method!r})')
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ConfigError(f"rank: must be a whole number, at least 1 (found: {rank!r})")
        chosen = {other: self[other] for other in weights}
        for other, adapter in chosen.items():
            if adapter.config.use_dora or adapter.modules or adapter.biases or adapter.config.bias != "none":
                raise AdapterError(
                    f'"{other}" trains more than factors (DoRA, biases or whole modules), which cannot be added up'
                )
        parts: dict[str, list[tuple[float, Any]]] = {}
        for other, adapter in chosen.items():
            for layer_name, layer in adapter.layers.items():
                parts.setdefault(layer_name, []).append((weights[other], layer))
        factors = {n: _side_by_side(found) for n, found in parts.items()}
        if method == "svd":
            size = rank or max(
                A.shape[0] for a in chosen.values() for layer in a.layers.values() for A in [layer.factors()[0]]
            )
            factors = {n: low_rank(A, B, size)[:2] for n, (A, B) in factors.items()}
        self._adapters[name] = self._from_factors(factors)
        return self._adapters[name]

    def _from_factors(self, factors: dict[str, tuple[Tensor, Tensor]]) -> Adapter:
        """An adapter of plain layers with these factors and a scaling of 1."""
        ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
        limits = {n: min(A.flatten(1).shape[1], B.shape[0]) for n, (A, B) in factors.items()}
        factors = {
            n: low_rank(A, B, limits[n])[:2] if ranks[n] > limits[n] else (A, B) for n, (A, B) in factors.items()
        }
        ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
        r = max(ranks.values())
        patterns = {as_pattern(n): k for n, k in ranks.items() if k != r}
        config = LoraConfig(
            r=r,
            lora_alpha=r,
            target_modules=list(factors),
            rank_pattern=patterns,
            alpha_pattern=dict(patterns),
            task_type=None,
        )
        with self.disabled():
            adapter = build_adapter(self.model, config, find_targets(self.model, config))
        state: dict[str, Tensor] = {}
        for layer_name, layer in adapter.layers.items():
            A, B = factors[layer_name]
            keys = (
                ("lora_embedding_A", "lora_embedding_B")
                if isinstance(layer, nn.Embedding)
                else ("lora_A.weight", "lora_B.weight")
            )
            state |= {f"{PREFIX}{layer_name}.{key}": factor for key, factor in zip(keys, (A, B), strict=True)}
        load_adapter_state(adapter, state, Path("combine"))
        return adapter

    def _check_free(self, name: str) -> None:
        if not name or name in self._adapters:
            raise AdapterError(f'an adapter is called "{name}" already' if name else "an adapter needs a name")


@torch.no_grad()
def _side_by_side(found: list[tuple[float, Any]]) -> tuple[Tensor, Tensor]:
    """(A, B) with B A = Σ weight · scaling · B_i A_i."""
    factors = [(weight * layer.scaling, *entries("", layer)[0][1:]) for weight, layer in found]
    return torch.cat([A for _, A, _ in factors]), torch.cat([scale * B for scale, _, B in factors], dim=1)
