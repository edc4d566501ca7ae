"""A base model without its numbers: built from its config alone, in the dtype and format it would be loaded in, on fake tensors.

A fake tensor (torch's `FakeTensorMode`) has shape, dtype and device and no memory; every operator answers with the shapes it would
have. The model says that it lies on the CPU and takes the paths it would take there. Adapters are put in before, on torch's meta device,
by the same `inject` as in training. Token ids and masks stay real, so what depends on their values is decided as in training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.lora.arithmetic import choose_arithmetic
from phinetune.lora.config import LoraConfig
from phinetune.lora.injection import inject
from phinetune.lora.rounding import round_model
from phinetune.model.fast import FastPaths, speed_up
from phinetune.model.grid import Grid
from phinetune.model.grid_weight import hold_on_grid
from phinetune.model.load import LoadPlan, quiet_transformers
from phinetune.model.quantized import BLOCK, Quantization, quiet_bitsandbytes

_SCALES_BLOCK = 256
"""Scales that share one scale with double quantization: bitsandbytes' size."""


def build_on_meta(
    config: Any,
    plan: LoadPlan,
    lora: LoraConfig,
    fast_paths: FastPaths,
    grid: Grid | None = None,
    layers: int | None = None,
) -> nn.Module:
    """The model of `config` with `lora` put in, on the meta device, in train mode; `layers` replaces the number of decoder layers.

    Raises what `inject` raises: targets that match nothing, ranks that do not fit.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    for key, value in plan.config_overrides.items():
        setattr(config, key, value)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    options: dict[str, Any] = {} if plan.attention is None else {"attn_implementation": plan.attention}
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=plan.dtype, trust_remote_code=plan.trust_remote_code, **options
        )
        model.tie_weights()
    if isinstance(plan.quantization, Grid):
        hold_on_grid(model, plan.quantization, plan.dtype)
    elif plan.quantization is not None:
        with quiet_bitsandbytes():
            _quantize(model, plan.quantization, plan.dtype)
    speed_up(model, fast_paths, lambda event: None)
    start = (
        True if lora.init_lora_weights == "loftq" else lora.init_lora_weights
    )  # the same shapes, and no weights to look at
    inject(model, replace(lora, init_lora_weights=start, loftq_config={}), on_event=lambda event: None)
    choose_arithmetic(model, fast_paths)
    if grid is not None:
        round_model(model, grid, plan.dtype)
    trained: nn.Module = model.train()
    return trained


def _quantize(model: Any, quantization: Quantization, dtype: torch.dtype) -> None:
    """Linear layers but the output head as bitsandbytes holds them: packed weights, scales, and the layer that reads them."""
    from bitsandbytes.nn import Linear4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        layer = Linear4bit(
            module.in_features, module.out_features, module.bias is not None, dtype, device=torch.device("meta")
        )
        layer.weight = _packed(module.weight, quantization, dtype)
        if module.bias is not None:
            layer.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _packed(weight: Tensor, quantization: Quantization, dtype: torch.dtype) -> Any:
    """`weight` as a 4-bit parameter with its `quant_state`, on the meta device."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    def meta(count: int, kind: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    blocks = -(-weight.numel() // BLOCK)
    state2 = None
    if quantization.double_quant:
        state2 = QuantState(
            meta(-(-blocks // _SCALES_BLOCK), torch.float32), code=meta(256, torch.float32), blocksize=_SCALES_BLOCK,
            dtype=torch.float32,
        )  # fmt: skip
    state = QuantState(
        meta(blocks, torch.uint8 if state2 else torch.float32), weight.shape, meta(16, torch.float32), BLOCK,
        quantization.quant_type, dtype, meta(1, torch.float32).squeeze() if state2 else None, state2,
    )  # fmt: skip
    packed = torch.empty((-(-weight.numel() // 2), 1), dtype=torch.uint8, device="meta")
    return Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, quant_type=quantization.quant_type,
        compress_statistics=quantization.double_quant, bnb_quantized=True,
    )  # fmt: skip


def without_numbers(model: nn.Module) -> nn.Module:
    """`model`, built on the meta device, with every tensor of it a fake one on the CPU; what was shared stays shared."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return _filled(model, lambda tensor: FakeTensor(mode, tensor.detach(), torch.device("cpu")))


def with_made_up_numbers(model: nn.Module) -> nn.Module:
    """`model`, built on the meta device, with every tensor of it a real one on the CPU: good for timing it, and for nothing else."""
    draw = torch.Generator().manual_seed(0)
    some = torch.empty(1 << 20).normal_(std=0.02, generator=draw)

    def made(tensor: Tensor) -> Tensor:
        real = torch.empty(tensor.shape, dtype=tensor.dtype)
        if not real.is_floating_point():
            return real.zero_()
        if real.dim() < 2:
            return real.fill_(1.0)
        for piece in torch.split(real.view(-1), len(some)):
            piece.copy_(some[: len(piece)])
        return real

    return _filled(model, made)


def _filled(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """`model`, built on the meta device, with `make` of every tensor in the tensor's place; what was shared stays shared."""
    done: dict[int, Tensor] = {}
    keep: list[Tensor] = []

    def made(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            one = make(tensor)
            if isinstance(tensor, nn.Parameter):
                one = nn.Parameter(one, requires_grad=tensor.requires_grad)
            if (state := getattr(tensor, "quant_state", None)) is not None:
                one.quant_state = _filled_state(state, made)  # type: ignore[attr-defined]
            done[id(tensor)] = one
            keep.append(tensor)  # its id must not be given away
        return done[id(tensor)]

    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for held in places:
            for name, value in list(held.items()):
                if isinstance(value, Tensor) and value.is_meta:
                    held[name] = made(value)
    return model


def _filled_state(state: Any, made: Callable[[Tensor], Tensor]) -> Any:
    """A bitsandbytes `QuantState` with `made` of its tensors."""
    state = copy.copy(state)
    for name, value in list(vars(state).items()):
        if isinstance(value, Tensor):
            setattr(state, name, made(value))
    if state.state2 is not None:
        state.state2 = _filled_state(state.state2, made)
    return state


def quantization_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors of every `quant_state` in `model`: they are no parameters, and they take memory."""
    found: list[Tensor] = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found += [v for v in vars(state).values() if isinstance(v, Tensor)]
            state = state.state2
    return found
