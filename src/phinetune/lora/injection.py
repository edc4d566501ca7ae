"""Put factors into a model and take them out again: the `Adapter` and how it is made. Works on any `nn.Module`.

An adapter is a set of parts, each standing in the model's tree where a part of the base stood: a LoRA layer over the base's own weight,
a trained copy of a module or of a bias. Putting an adapter in or taking it out is a handful of assignments; the base is never copied
and never changed. Not here: which layers are meant (`targets.py`), what they compute, files.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from phinetune.errors import AdapterError, ConfigError
from phinetune.events import Note, OnEvent, log_event
from phinetune.lora.config import LoraConfig
from phinetune.lora.conv import ConvLoRA, conv_class
from phinetune.lora.embedding import Embedding
from phinetune.lora.frozen import is_quantized
from phinetune.lora.fused import fused_slices
from phinetune.lora.layer import lora_layers, plain_layer
from phinetune.lora.linear import Linear, MergedLinear
from phinetune.lora.start import Original, start
from phinetune.lora.targets import Target, find_targets, kind_of_layer, named_modules_to_save
from phinetune.model.quantized import keep_readable


@dataclass
class Adapter:
    """What is trained beside a base model. Every dictionary is keyed by the part's name in the model."""

    config: LoraConfig
    layers: dict[str, Any] = field(default_factory=dict)
    """LoRA layers."""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Trained copies of whole modules (`modules_to_save`)."""
    biases: dict[str, nn.Parameter] = field(default_factory=dict)
    """Trained biases outside the LoRA layers."""
    base: dict[str, Any] = field(default_factory=dict)
    """The base model's own parts in their places."""
    lookalikes: list[str] = field(default_factory=list)
    """Layers of the model that have no factors and whose names end in the name of one that has."""

    def parts(self) -> dict[str, Any]:
        """Everything that stands in the model's tree while the adapter is in."""
        return {**self.layers, **self.modules, **self.biases}

    def put(self, model: nn.Module) -> None:
        """Freeze `model`, which is the plain base, and put the adapter into it, on its device and in its mode."""
        model.requires_grad_(False)
        _follow(self.base, self.parts())
        _place(model, self.parts())

    def take_out(self, model: nn.Module) -> None:
        """Put the base's own parts back, in the mode that `model` is in; they stay frozen.

        Raises AdapterError if the adapter is not in `model` any more, because it was merged or something else took its place.
        """
        now = self.parts()
        for name, part in now.items():
            parent, _, child = name.rpartition(".")
            if getattr(model.get_submodule(parent), child, None) is not part:
                raise AdapterError(f"{name}: the adapter is not in the model any more", "was it merged?")
        _follow(now, self.base)
        _place(model, self.base)


def _follow(there: dict[str, Any], coming: dict[str, Any]) -> None:
    """Bring parts that come into a model to the device, dtype and mode of those there: the model may have been moved in between."""
    for name, part in coming.items():
        now = there[name]
        if isinstance(part, nn.Parameter):
            part.data = part.data.to(now)
            continue
        part.train(now.training)
        if hasattr(part, "lora_A") or hasattr(now, "lora_A"):  # they share the weight, which has been moved already
            layer = part if hasattr(part, "lora_A") else now
            if layer is part:
                part.to(layer.frozen().device)
            theirs, own = (getattr(getattr(m, "conv", m), "bias", None) for m in (now, part))
            if own is not None and theirs is not None and own is not theirs:
                own.data = own.data.to(theirs)
        else:
            reference = next(p for p in now.parameters() if p.is_floating_point())
            part.to(device=reference.device, dtype=reference.dtype)


def _place(model: nn.Module, parts: dict[str, Any]) -> None:
    for name, part in parts.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, part)


def inject(
    model: nn.Module, config: LoraConfig, original: Original | None = None, on_event: OnEvent = log_event
) -> Adapter:
    """Freeze `model` and put factors beside its targeted layers, over the same weights; also its `modules_to_save` and biases.

    original: for init_lora_weights "loftq" over a 4-bit base, gives a layer's weight before it was rounded. Raises AdapterError, before
    anything is changed, if a target matches nothing, or a rank does not fit a layer; ConfigError for "loftq" without a 4-bit base.
    """
    targets = find_targets(model, config, on_event=on_event)
    check_loftq(model, config, targets, original, on_event)
    adapter = build_adapter(model, config, targets, original)
    adapter.put(model)
    return adapter


def check_loftq(
    model: nn.Module, config: LoraConfig, targets: list[Target], original: Original | None, on_event: OnEvent
) -> None:
    """Raises ConfigError if "loftq" is asked for and the base is not in 4 bits, or its original weights are not to be had."""
    if config.init_lora_weights != "loftq":
        return
    plain = [t.name for t in targets if not is_quantized(getattr(model.get_submodule(t.name), "weight", None))]
    if len(plain) == len(targets):
        raise ConfigError(
            'init_lora_weights: "loftq" is for a base model in 4 bits, and no targeted layer is',
            "load it with model_kwargs.load_in_4bit",
        )
    if original is None:
        raise ConfigError(
            'init_lora_weights: "loftq" needs the weights before they were rounded to 4 bits',
            "give inject a function: original(name) -> weight (out, in)",
        )
    if plain:
        more = f" and {len(plain) - 1} more are" if len(plain) > 1 else " is"
        on_event(Note(f"init_lora_weights: loftq: {plain[0]}{more} not in 4 bits and starts without a change"))


def _trained(part: nn.Module, config: LoraConfig) -> list[nn.Parameter]:
    """The parameters of a LoRA layer or a trained module that learn."""
    if not hasattr(part, "lora_A"):
        return list(part.parameters())
    with_bias = config.bias != "none"
    return [p for n, p in part.named_parameters() if "lora_" in n or (with_bias and n.rpartition(".")[2] == "bias")]


def build_adapter(
    model: nn.Module, config: LoraConfig, targets: list[Target], original: Original | None = None
) -> Adapter:
    """An adapter for `targets` with its factors at their start, not yet in `model`."""
    keep_readable(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        adapter = _build(model, config, targets, original)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])  # as it was: nothing is frozen until the adapter goes in
    for part in adapter.parts().values():
        for parameter in [part] if isinstance(part, nn.Parameter) else _trained(part, config):
            parameter.requires_grad_(True)
    adapter.lookalikes = lookalikes(model, list(adapter.layers))
    return adapter


def lookalikes(model: nn.Module, names: list[str]) -> list[str]:
    """Layers that could have factors, are not among `names`, and would be taken for one of them by its ending."""
    endings = tuple(f".{name}" for name in names)
    modules = {n: m for n, m in model.named_modules() if n not in names and n.endswith(endings)}
    return [n for n, m in modules.items() if kind_of_layer(m) is not None]


def _build(model: nn.Module, config: LoraConfig, targets: list[Target], original: Original | None) -> Adapter:
    adapter = Adapter(config)
    for target in targets:
        base = model.get_submodule(target.name)
        layer = make_layer(base, target, config, original)
        slices = fused_slices(model, target.name, base, config.fused_modules)
        if slices and target.kind == "linear":  # known to whole layers too, which can be saved split
            layer.slice_names, layer.slice_widths = tuple(slices), tuple(slices.values())
        adapter.layers[target.name], adapter.base[target.name] = layer, base
    for name in named_modules_to_save(model, config):
        adapter.base[name] = model.get_submodule(name)
        adapter.modules[name] = copy.deepcopy(adapter.base[name])
    inside = [*adapter.layers, *adapter.modules]
    for name, parameter in model.named_parameters():
        is_bias = config.bias == "all" and name.rpartition(".")[2] == "bias"
        if is_bias and not any(name.startswith(f"{i}.") for i in inside):
            adapter.base[name] = parameter
            adapter.biases[name] = nn.Parameter(parameter.detach().clone())
    return adapter


def make_layer(base: nn.Module, target: Target, config: LoraConfig, original: Original | None = None) -> Any:
    """A LoRA layer over `base`, its factors at their start."""
    r, dropout = target.r, config.lora_dropout
    layer: Any
    if target.slices:
        enable = [part in target.enabled for part in target.slices]
        layer = MergedLinear.from_base(base, r, 1.0, dropout, enable, list(target.slices.values()))
    elif target.kind == "linear":
        layer = Linear.from_base(base, r, 1.0, dropout)
    elif target.kind == "embedding":
        layer = Embedding.from_base(base, r, 1.0)
    else:
        layer = conv_class(base).from_base(base, r, 1.0, dropout)
    layer.rescale(target.scaling)
    wanted = config.init_lora_weights == "loftq" and original is not None and is_quantized(layer.frozen())
    start(layer, config.init_lora_weights, config.use_dora, original(target.name) if wanted and original else None)
    if config.bias != "none":
        _own_bias(layer)
    return layer


def _own_bias(layer: Any) -> None:
    """Give the layer a bias of its own, so that training it leaves the base's alone."""
    if isinstance(layer, ConvLoRA):
        layer.conv = plain_layer(layer)
    holder = layer.conv if isinstance(layer, ConvLoRA) else layer
    bias = getattr(holder, "bias", None)
    if bias is not None:
        holder.bias = nn.Parameter(bias.detach().clone())


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter that is in `model` already: LoRA layers built by hand, and every other parameter that learns.

    Raises AdapterError if the model has no LoRA layers.
    """
    layers = lora_layers(model)
    if not layers:
        raise AdapterError(
            "the model has no LoRA layers", "put some in with inject, or build it with phinetune.lora.Linear"
        )
    inside = tuple(f"{name}." for name in layers)
    others = [(n, p) for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)]
    biases = {n: p for n, p in others if n.rpartition(".")[2] == "bias"}
    owners = list(dict.fromkeys(n.rpartition(".")[0] for n, _ in others if n not in biases))
    if "" in owners:
        raise AdapterError("a parameter of the model itself learns; only those of its modules can be saved")
    modules = {name: model.get_submodule(name) for name in owners}
    biases = {n: p for n, p in biases.items() if n.rpartition(".")[0] not in modules}
    ranks = [layer.r for layer in layers.values()]
    trains_bias = any(
        p.requires_grad for n, p in model.named_parameters() if n.startswith(inside) and n.endswith("bias")
    )
    config = LoraConfig(
        r=max(ranks),
        target_modules=list(layers),
        modules_to_save=owners or None,
        bias="all" if biases else "lora_only" if trains_bias else "none",
        use_dora=any(layer.lora_magnitude_vector is not None for layer in layers.values()),
        task_type=None,
    )
    return Adapter(config, layers, modules, biases, lookalikes=lookalikes(model, list(layers)))
