"""Which decoder layers of a model are computed in one function (`decoder.py`), and whether one of their calls can be.

Not here: what is computed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from phinetune.lora import tiles
from phinetune.lora.decoder import DecoderFunction, How
from phinetune.lora.decoder_memory import CALLS, Shape
from phinetune.lora.group import ordinary, plain_layer
from phinetune.lora.linear import Linear
from phinetune.model import attention_tiles, gated, kernels, residual, rotary
from phinetune.model.attention import is_tree
from phinetune.model.compute import main_memory
from phinetune.model.fast import TREES
from phinetune.model.norm import RMSNorm

_SHARE_FOR_COPIES = 16
"""Weights are packed, where that pays, if it takes no more than one part in so many of main memory."""
_INTO = ("qkv_proj",), ("q_proj", "k_proj", "v_proj")
_WIDEN = ("gate_up_proj",), ("gate_proj", "up_proj")


class DecoderLayer:
    """A decoder layer whose parts are all of the kinds that one function computes; `compute` looks at the rest, each time."""

    def __init__(self, parts: list[tuple[Any, str, Any]], layers: list[Linear], shape: Shape) -> None:
        self.parts, self.layers, self.shape = parts, layers, shape
        self.attention = parts[1][2]
        self.forwards = [(part, vars(part)["forward"]) for part in (parts[1][2], parts[3][2])]
        self.norms: list[RMSNorm] = [parts[0][2], parts[2][2]]
        self._served: tuple[int, ...] = ()
        self._made_of: list[tuple[int, int]] = []

    def forward(self, module: Any, x: Tensor, **kwargs: Any) -> Tensor:
        """As `residual.layer`, in one function where that can be."""
        found = self.compute(x, **kwargs)
        return residual.layer(module, x, **kwargs) if found is None else found

    def compute(
        self, x: Tensor, attention_mask: Tensor | None = None, position_embeddings: Any = None, past_key_values: Any = None, **_: Any
    ) -> Tensor | None:  # fmt: skip
        """x (B, T, hidden) -> (B, T, hidden); None if another way has to be taken."""
        attention, shape = self.attention, self.shape
        if past_key_values is not None or position_embeddings is None or x.dtype is not torch.bfloat16 or x.dim() != 3:
            return None
        if not is_tree(attention_mask) and (
            attention_mask is not None or attention.config._attn_implementation == TREES
        ):
            return None
        B, T, width = x.shape
        cos, sin = position_embeddings
        if B * T < tiles.FEWEST or width != shape.hidden or not self._as_found() or not self._can_read(x, cos, sin):
            return None
        entries = rotary.batch_plan(attention_mask, B, T).entries
        if entries is None or not attention_tiles.serves(
            B * T, shape.heads, shape.groups, shape.D, cos.shape[-1], entries
        ):
            return None
        scalings, tensors = self._scalings(), self._tensors()
        if scalings is None or tensors is None:
            return None
        how = How(
            shape,
            entries,
            (self.norms[0].eps, self.norms[1].eps, attention.scaling, *scalings),
            self._packed(tensors[2 : 2 + len(self.layers)]),
        )
        cos, sin = (a.expand(B, T, -1).reshape(B * T, -1) for a in (cos, sin))
        result: Tensor = DecoderFunction.apply(how, x, cos, sin, *tensors)  # type: ignore[no-untyped-call]
        return result

    def _as_found(self) -> bool:
        """True while all parts are in their places, nobody listens at them, and LoRA layers are nothing but that."""
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return False
        for parent, name, part in self.parts:
            if parent._modules.get(name) is not part or part._forward_hooks or part._forward_pre_hooks:
                return False
            if part._backward_hooks or part._backward_pre_hooks:
                return False
        for part, own in self.forwards:
            if vars(part).get("forward") is not own:
                return False
        for layer in self.layers:
            if not plain_layer(layer) or layer.rounding is not None or "forward" in vars(layer):
                return False
        return not (self.attention.training and getattr(self.attention, "attention_dropout", 0.0))

    def _can_read(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        angles = cos.dim() == 3 and cos.shape == sin.shape and cos.dtype is sin.dtype is x.dtype
        return angles and ordinary(x) and kernels.undisturbed() and all(map(kernels.plain, (x, cos, sin)))

    def _scalings(self) -> list[float] | None:
        """s = alpha / r of each call; None if layers of one call differ."""
        of_layers = [layer.scaling for layer in self.layers]
        calls = [of_layers[self.shape.projections(call)] for call in CALLS]
        return [own[0] for own in calls] if all(len(set(own)) == 1 for own in calls) else None

    def _tensors(self) -> list[Tensor] | None:
        """The normalizations' weights, W of all projections, A, B; None if they are not as compiled code wants them."""
        own, n = [layer._parameters for layer in self.layers], len(self.layers)
        tensors: list[Any] = [norm._parameters["weight"] for norm in self.norms]
        tensors += [p[name] for name in ("weight", "lora_A", "lora_B") for p in own]
        if any(t.requires_grad for t in tensors[: 2 + n]) or any(p["bias"] is not None for p in own):
            return None
        numbers = type(tensors[2]) is nn.Parameter
        now = tuple(t.data_ptr() for t in tensors) if numbers else ()
        if not numbers or now != self._served:  # what lies where it lay when it was looked at is what it was
            if not self._serves(tensors):
                return None
            self._served = now
        return tensors

    def pack(self) -> None:
        """Keep the weights, twice more, as `tiles.pack` lays them out; the copies are buffers of the layers that no file holds.

        Only of a layer that is `servable`.
        """
        for layer in self.layers:
            layer.register_buffer("packed", tiles.pack(layer.weight.detach()), persistent=False)
        self._made_of = [_state(layer.weight) for layer in self.layers]

    def servable(self) -> bool:
        """True for weights that tiles can take, with numbers in main memory or without any."""
        weights = [layer.weight for layer in self.layers]
        return all(tiles.takes(w) and w.device.type in ("cpu", "meta") for w in weights)

    def unpack(self) -> None:
        """Forget what `pack` made."""
        for layer in self.layers:
            layer._buffers.pop("packed", None)

    def _packed(self, weights: list[Any]) -> tuple[Tensor, ...]:
        """What `pack` made of all `weights`; nothing where it did not, or where they are not what it was made of."""
        found = [packed for layer in self.layers if (packed := layer._buffers.get("packed")) is not None]
        if len(found) < len(weights) or not all(p.dtype is torch.bfloat16 and kernels.plain(p) for p in found):
            return ()
        return tuple(found) if self._made_of == [_state(w) for w in weights] else ()

    def _serves(self, tensors: list[Any]) -> bool:
        n, norms = len(self.layers), tensors[:2]
        fits = all(w.dtype is torch.bfloat16 and kernels.plain(w) and w.is_contiguous() for w in norms)
        for call, width in zip(CALLS, self.shape.inputs(), strict=True):
            own = range(n)[self.shape.projections(call)]
            fits = fits and tiles.fit(
                width, [(tensors[2 + i], None, tensors[2 + n + i], tensors[2 + 2 * n + i]) for i in own]
            )
        return fits


def joinable(module: Any) -> DecoderLayer | None:
    """`module`, if it is a decoder layer that `residual.forward` computes, of parts that `rotary` and `gated` compute, with LoRA in all projections."""
    if not _computed_by(module, residual.forward):
        return None
    attention, mlp = module.self_attn, module.mlp
    if not (_computed_by(attention, rotary.forward) and _computed_by(mlp, gated.forward)):
        return None
    if not vars(attention)["forward"].keywords.get("by_tiles"):
        return None
    into, widen = (
        next(names for names in kinds if hasattr(owner, names[0]))
        for owner, kinds in ((attention, _INTO), (mlp, _WIDEN))
    )
    at = [*((attention, n) for n in (*into, "o_proj")), *((mlp, n) for n in (*widen, "down_proj"))]
    projections: list[tuple[Any, str, Any]] = [(owner, name, getattr(owner, name)) for owner, name in at]
    layers = [part for *_, part in projections]
    norms = module.input_layernorm, module.post_attention_layernorm
    if not all(type(part) is Linear and part.r > 0 and not part.fan_in_fan_out for part in layers):
        return None
    if not all(isinstance(norm, RMSNorm) and norm.built for norm in norms):
        return None
    text = attention.config.get_text_config()
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    shape = Shape(
        layers[0].in_features, heads, groups, attention.head_dim, layers[-1].in_features, len(into), len(widen)
    )
    if [part.out_features for part in layers] != list(shape.widths()) or shape.hidden > kernels.WIDEST:
        return None
    if any(layers[shape.projections(c)][0].in_features != n for c, n in zip(CALLS, shape.inputs(), strict=True)):
        return None
    parts = [
        (module, "input_layernorm", norms[0]), (module, "self_attn", attention), (module, "post_attention_layernorm", norms[1]),
        (module, "mlp", mlp), *projections,
    ]  # fmt: skip
    return DecoderLayer(parts, layers, shape)


def join_layers(model: nn.Module, packed: bool | None) -> None:
    """Let those decoder layers of `model` be computed in one function of which that can be. packed: as `FastPaths` has it."""
    found = [(module, layer) for module in model.modules() if (layer := joinable(module)) is not None]
    for module, layer in found:
        module.forward = functools.partial(residual.forward, module, compute=layer.forward)
    packable = [layer for _, layer in found if packed is not False and layer.servable()]
    copies = sum(2 * 2 * one.weight.numel() for layer in packable for one in layer.layers)
    if packed or (tiles.packing_pays() and copies <= (main_memory() or 0) // _SHARE_FOR_COPIES):
        for layer in packable:
            layer.pack()


def part_layers(model: nn.Module) -> None:
    """The reverse of `join_layers`."""
    for module in model.modules():
        layer = getattr(getattr(vars(module).get("forward"), "keywords", {}).get("compute"), "__self__", None)
        if isinstance(layer, DecoderLayer):
            layer.unpack()
            module.forward = functools.partial(residual.forward, module)


def is_packed(model: nn.Module) -> bool:
    """True if `join_layers` has packed weights."""
    return any(type(module) is Linear and "packed" in module._buffers for module in model.modules())


def _state(weight: Tensor) -> tuple[int, int]:
    """Where a weight lies, and how often it was written to; nothing of one without numbers."""
    numbers = type(weight) in kernels.WITH_NUMBERS and not weight.is_meta
    return (weight.data_ptr(), weight._version) if numbers else (0, 0)


def _computed_by(module: Any, function: Any) -> bool:
    """True if `function` stands in the place of the module's own forward."""
    return getattr(vars(module).get("forward"), "func", None) is function
