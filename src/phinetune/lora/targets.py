"""Which layers of a model are meant: names, endings, regular expressions, "all-linear", slices of fused layers, ranks by pattern.

The rules are PEFT's, so a configuration means the same layers in both; what PEFT passes over in silence (a target that matches
nothing, a pattern that is never used) is an error here. Nothing is changed in the model. Not here: making layers (`injection.py`).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from phinetune.errors import AdapterError, PhinetuneError
from phinetune.events import Note, OnEvent, log_event
from phinetune.lora.config import LoraConfig
from phinetune.lora.frozen import check_frozen
from phinetune.lora.fused import fused_slices, named_by_parts
from phinetune.lora.layer import LoRALayer, check_rank

Kind = Literal["linear", "embedding", "conv"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """One layer that gets factors. `slices` (name -> width, all of them in order) and `enabled` are set for a layer adapted by slices."""

    name: str
    kind: Kind
    r: int
    scaling: float
    slices: dict[str, int] | None = None
    enabled: tuple[str, ...] = ()

    def slice_name(self, part: str) -> str:
        """What the slice would be called if it were a layer: `...self_attn.q_proj`."""
        parent = self.name.rpartition(".")[0]
        return f"{parent}.{part}" if parent else part


def find_targets(
    model: nn.Module, config: LoraConfig, saved: bool = False, on_event: OnEvent = log_event
) -> list[Target]:
    """The layers that `config` targets, in the model's order. With `saved` it describes an adapter that exists: its tensors decide.

    The name of a fused layer (qkv_proj) means its parts in a model that has them as layers of their own, which is said in a note.

    Raises AdapterError, with everything that is wrong, if a given target or pattern matches nothing, a rank does not fit its layer, or
    a layer cannot have factors.
    """
    layers = adaptable_layers(model)
    fused = {name: s for name in layers if (s := fused_slices(model, name, layers[name], config.fused_modules))}
    if not saved:
        parts = [f"{n.rpartition('.')[0]}.{part}" for n, slices in fused.items() for part in slices]
        config, note = named_by_parts(config, [*layers, *parts], [n for n, _ in model.named_modules()])
        if note:
            on_event(Note(note))
    chosen, unmatched = _choose(model, config, layers, fused)
    if not chosen or not saved:
        _check_chosen(model, config, layers, fused, chosen, unmatched)
    problems = [p for t in chosen for p in _misfit(t, layers[t.name], config, saved)]
    problems += [] if saved else _shared(model, [t.name for t in chosen])
    names = [n for t in chosen for n in ([t.slice_name(p) for p in t.enabled] if t.slices else [t.name])]
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        unused = [p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", n) for n in names)]
        problems += [f'{key}: "{p}" matches no layer that is adapted{_nearest(p, names)}' for p in unused if not saved]
    transposed = [t.name for t in chosen if t.kind == "linear" and not isinstance(layers[t.name], nn.Linear)]
    if config.fan_in_fan_out and not transposed and not saved:
        problems.append(f"fan_in_fan_out: {chosen[0].name} is an nn.Linear, which stores its weight (out, in)")
    if problems:
        raise AdapterError(problems, "" if saved else "lower r for such layers, or leave them out with exclude_modules")
    return chosen


def _shared(model: nn.Module, names: list[str]) -> list[str]:
    """A line for every layer that stands at two places of the model: factors at one of them would be no adapter of the other."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    by_name = {p[0]: p for p in places.values() if len(p) > 1}
    return [f"{n}: the same layer stands at {' and '.join(by_name[n][:3])}" for n in names if n in by_name]


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, of every layer that can have factors. Raises AdapterError for a model that has LoRA layers already."""
    if present := [n for n, m in model.named_modules() if isinstance(m, LoRALayer)]:
        raise AdapterError(
            f"{present[0]}: is a LoRA layer already, as {len(present) - 1} more",
            "merge it first, or keep several adapters on one base with phinetune.lora.Adapters",
        )
    if kind_of_layer(model) is not None:
        raise AdapterError(
            f"the model is a single {type(model).__name__}, which cannot be replaced in place", "put it into a module"
        )
    passed_by = [  # in evaluation torch's fused kernel reads their weights and never calls them
        f"{name}.{child}".removeprefix(".")
        for name, m in model.named_modules()
        if isinstance(m, nn.TransformerEncoderLayer)
        for child in ("linear1", "linear2")
    ]
    return {n: m for n, m in model.named_modules() if kind_of_layer(m) is not None and n not in passed_by}


def kind_of_layer(module: nn.Module) -> Kind | None:
    """What kind of factors a layer can have; None if none."""
    if (
        type(module).__name__ == "NonDynamicallyQuantizableLinear"
    ):  # nn.MultiheadAttention reads its weight and never calls it
        return None
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, _CONVOLUTIONS) else None


def is_conv1d(module: nn.Module) -> bool:
    """True for GPT-2's Conv1D: a linear layer that stores its weight (in, out). Known by its shape, without importing transformers."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.dim() == 2


def is_targeted(name: str, config: LoraConfig) -> bool:
    """True if `config` means the layer called `name` by a list of names, judged by the name alone."""
    kept = config.modules_to_save or []
    if isinstance(config.target_modules, str) or _excluded(name, config) or not _in_chosen_layer(name, config):
        return False
    return any(_ends_in(name, t) for t in config.target_modules) and not any(
        name.endswith(k) or f"{k}." in name for k in kept
    )


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, where the model can name it (`get_output_embeddings` of transformers)."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def named_modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the modules that `modules_to_save` means: those that end so, as in PEFT. Raises AdapterError if an entry matches none."""
    names = [n for n, _ in model.named_modules() if n]
    found = [n for n in names if n.endswith(tuple(config.modules_to_save or []))]
    unmatched = [t for t in config.modules_to_save or [] if not any(n.endswith(t) for n in names)]
    problems = [f'modules_to_save: "{t}" matches no module{_nearest(t, names)}' for t in unmatched]
    problems += [
        f"modules_to_save: {n} has no parameters"
        for n in found
        if next(model.get_submodule(n).parameters(), None) is None
    ]
    quantized = [n for n in found if any(not p.is_floating_point() for p in model.get_submodule(n).parameters())]
    problems += [f"modules_to_save: {n} holds quantized weights, which cannot be trained" for n in quantized]
    if problems:
        raise AdapterError(problems)
    return [n for n in found if not any(n.startswith(f"{outer}.") for outer in found)]


def _choose(
    model: nn.Module, config: LoraConfig, layers: dict[str, nn.Module], fused: dict[str, dict[str, int]]
) -> tuple[list[Target], list[str]]:
    """(targets, the entries of `target_modules` that match nothing)."""
    targets, head = config.target_modules, output_head(model)
    kept_whole = named_modules_to_save(model, config)
    everything, is_pattern = targets == "all-linear", isinstance(targets, str)
    wanted = [targets] if isinstance(targets, str) else targets

    def hits(name: str) -> set[str]:
        return set() if everything else {t for t in wanted if _matches(name, t, is_pattern)}

    matched: set[str] = set()
    chosen: list[Target] = []
    for name, layer in layers.items():
        kind = cast(Kind, kind_of_layer(layer))
        target = Target(name, kind, config.rank_of(name), config.scaling_of(name))
        parts = {p: target.slice_name(p) for p in fused.get(name, {})}
        by_name, by_slice = hits(name), {p: hits(v) for p, v in parts.items()}
        matched |= by_name.union(*by_slice.values())
        whole = bool(by_name) or (everything and kind == "linear" and layer is not head)
        enabled = tuple(p for p, v in parts.items() if (whole or by_slice[p]) and not _excluded(v, config))
        in_kept = any(name == k or name.startswith(f"{k}.") for k in kept_whole)
        if _excluded(name, config) or not _in_chosen_layer(name, config) or in_kept:
            continue
        if whole and len(enabled) == len(parts):
            chosen.append(target)
        elif enabled:
            first = parts[enabled[0]]
            r, scaling = config.rank_of(first), config.scaling_of(first)
            chosen.append(Target(name, kind, r, scaling, fused[name], enabled))
    return chosen, [] if everything else [t for t in wanted if t not in matched]


def _check_chosen(
    model: nn.Module,
    config: LoraConfig,
    layers: dict[str, nn.Module],
    fused: dict[str, dict[str, int]],
    chosen: list[Target],
    unmatched: list[str],
) -> None:
    """Raises AdapterError for entries that match nothing, and for a choice that leaves nothing."""
    if unmatched:
        endings = list(
            dict.fromkeys([*(n.rpartition(".")[2] for n in layers), *(p for s in fused.values() for p in s)])
        )
        others = {n: type(m).__name__ for n, m in model.named_modules() if n not in layers}
        is_pattern = isinstance(config.target_modules, str)
        problems = []
        for t in unmatched:
            other = next((n for n in others if _matches(n, t, is_pattern)), None)
            near = f" ({other} is a {others[other]})" if other else _nearest(t, endings)
            problems.append(f'target_modules: "{t}" matches no layer that can have factors{near}')
        raise AdapterError(problems, f"the layers' names end in: {', '.join(endings)}")
    numbers = config.layers_to_transform
    asked = numbers if isinstance(numbers, list) else [] if numbers is None else [numbers]
    if absent := sorted(set(asked) - {_layer_number(t.name, config) for t in chosen}):
        here = sorted({n for name in layers if (n := _layer_number(name, config)) is not None})
        raise AdapterError(
            f"layers_to_transform: {', '.join(map(str, absent))} matches no layer that is targeted",
            f"numbered layers here: {here[0]} to {here[-1]}"
            if here
            else "the model has no numbered layers of that name",
        )
    excluded = config.exclude_modules or []
    given = [excluded] if isinstance(excluded, str) else excluded
    every = [*layers, *(t for n, s in fused.items() for p in s for t in [f"{n.rpartition('.')[0]}.{p}"])]
    if idle := [e for e in given if not any(_matches(n, e, isinstance(excluded, str)) for n in every)]:
        raise AdapterError([f'exclude_modules: "{e}" matches no layer{_nearest(e, every)}' for e in idle])
    if not chosen:
        empty = "target_modules: the model has no linear layers"
        if config.exclude_modules:
            empty = "exclude_modules: leaves no layer to train"
        elif config.modules_to_save and layers:
            empty = "target_modules: every layer that it means is trained whole, by modules_to_save"
        raise AdapterError(empty)


def _misfit(target: Target, layer: Any, config: LoraConfig, saved: bool) -> list[str]:
    """What is wrong with giving `layer` these factors."""
    name, problems = target.name, []
    try:
        check_frozen(name, layer)
        if not isinstance(layer.weight, nn.Parameter):
            problems.append(f"{name}: its weight is computed from other parameters (weight_norm, parametrize)")
        if saved:
            pass  # whatever its rank, it exists
        elif target.kind == "linear":
            out, features = shape_of(layer)
            narrowest = min([target.slices[p] for p in target.enabled]) if target.slices else out
            check_rank(target.r, features, narrowest)
        elif target.kind == "embedding":
            check_rank(target.r, layer.num_embeddings, layer.embedding_dim)
        else:
            check_rank(target.r, layer.in_channels * _size(layer.kernel_size), layer.out_channels)
        if target.kind == "conv":
            if layer.groups != 1:
                problems.append(
                    f"{name}: groups={layer.groups}; grouped convolutions have no factors that could be merged"
                )
            if isinstance(layer.padding, str) or layer.padding_mode != "zeros" or set(layer.dilation) != {1}:
                problems.append(
                    f"{name}: a convolution with dilation or padding by name or mode has no form in PEFT's format"
                )
    except PhinetuneError as error:
        problems += [p if p.startswith(name) else f"{name}: {p}" for p in error.problems]
    sizes = {(config.rank_of(n), config.scaling_of(n)) for n in map(target.slice_name, target.enabled)}
    if len(sizes) > 1:
        problems.append(f"{name}: rank_pattern and alpha_pattern give its slices different sizes, they share one")
    if target.slices and (config.use_dora or config.init_lora_weights not in (True, False, "gaussian", "loftq")):
        what = "use_dora" if config.use_dora else f"init_lora_weights: {config.init_lora_weights!r}"
        problems.append(f"{name}: {what} does not go with slices of a fused layer; target the whole layer")
    special = isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian"
    if special and target.kind != "linear":
        problems.append(f"{name}: init_lora_weights: {config.init_lora_weights!r} is for linear layers")
    if not problems and not _computes_as_expected(layer, target.kind):
        problems.append(f"{name}: is a {type(layer).__name__}, which computes something else than its weight says")
    return problems


def shape_of(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, however its weight is stored."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    features, out = layer.weight.shape
    return out, features


def _size(kernel: tuple[int, ...]) -> int:
    product = 1
    for k in kernel:
        product *= k
    return product


@torch.no_grad()
def _computes_as_expected(layer: Any, kind: Kind) -> bool:
    """False for a subclass whose forward is not what a LoRA layer will compute in its place; tried out, on a few numbers."""
    if type(layer).forward in (nn.Linear.forward, nn.Embedding.forward) or kind == "conv":
        return True
    if layer.weight.is_meta or hasattr(layer.weight, "quant_state"):
        return True
    weight = layer.weight
    try:
        if kind == "embedding":
            ids = torch.arange(min(8, weight.shape[0]), device=weight.device).unsqueeze(0)
            wanted = nn.functional.embedding(ids, weight)
            scale = getattr(layer, "embed_scale", None)
            wanted = wanted if scale is None else wanted * torch.as_tensor(scale).to(wanted)
            return bool(torch.allclose(layer(ids), wanted, rtol=1e-2))
        x = torch.linspace(-1, 1, shape_of(layer)[1], device=weight.device, dtype=weight.dtype).unsqueeze(0)
        stored = weight if isinstance(layer, nn.Linear) else weight.t()
        wanted = nn.functional.linear(x, stored, layer.bias)
        return bool(torch.allclose(layer(x), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())))
    except Exception:  # whatever a foreign layer makes of these numbers, it is not what is expected
        return False


def _matches(name: str, target: str, is_pattern: bool) -> bool:
    """PEFT's rule: a text is a regular expression for the whole name; the entries of a list are whole names or name endings."""
    return re.fullmatch(target, name) is not None if is_pattern else _ends_in(name, target)


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _excluded(name: str, config: LoraConfig) -> bool:
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        return _matches(name, excluded, True)
    return any(_ends_in(name, e) for e in excluded)


def _in_chosen_layer(name: str, config: LoraConfig) -> bool:
    chosen = config.layers_to_transform
    if chosen is None or (isinstance(config.target_modules, list) and name in config.target_modules):
        return True
    return _layer_number(name, config) in (chosen if isinstance(chosen, list) else [chosen])


def _layer_number(name: str, config: LoraConfig) -> int | None:
    """PEFT's rule: the first number in the name counts, after the list's name where `layers_pattern` gives one."""
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1])
    return None


def _nearest(target: str, names: list[str]) -> str:
    endings = list(dict.fromkeys(n.rpartition(".")[2] for n in names))
    near = difflib.get_close_matches(target.rpartition(".")[2], endings, n=1, cutoff=0.5)
    return f', did you mean "{near[0]}"?' if near else ""
