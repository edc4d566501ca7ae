"""The fast paths of training, each with a switch, and putting those into a model that belong to the model.

The model stays transformers' own: attention comes in through its attention interface, normalizations are exchanged for modules over the
same weights. Each is tried on the model first, against what it stands for; what computes something else is left out and said.

Not here: the arithmetic (`attention.py`, `norm.py`), LoRA's own fast paths (`lora/functional.py`, `lora/group.py`), the loss.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phinetune.errors import ConfigError, did_you_mean, first_line
from phinetune.events import Note, OnEvent, log_event

if TYPE_CHECKING:
    import torch

ATTENTION = "phinetune_blocks"
"""What our attention is called among those of transformers."""
TREES = "phinetune_trees"
"""The same where rows that are no tree go to torch's kernel."""
_BOTH = "phinetune_compared"  # the same for torch's attention while it is compared with ours


@dataclass(frozen=True)
class FastPaths:
    """Which fast paths a run takes. Each computes what its reference computes; `reference` has none of them."""

    attention: bool = True
    """On a CPU: blocks of batched products in the place of the fused kernel; of a tree only what is seen."""
    fused_rows: bool | None = None
    """With `attention`: rows that are no tree through torch's fused kernel all the same. None: only where `choose_rows` has found it to be
    faster."""
    norm: bool = True
    """Root-mean-square normalization in one function."""
    kernels: bool = True
    """On a CPU: what stands between the products (normalization, residual sums, the gated activation, positions, rows and softmax of attention)
    by compiled functions, where they were built."""
    linear: bool = True
    """Each LoRA layer in one autograd function."""
    grouped: bool = True
    """LoRA layers that share their input in one function (query, key and value; gate and up)."""
    tiles: bool = True
    """In bfloat16, on processors that multiply it in tiles (AMX) or vectors (AVX-512): LoRA layers that share their input, factors and frozen weights, in one call; with `kernels`, attention
    between its projections in one call; with `chunked_loss`, a frozen output head and the loss in one call, without logits."""
    layers: bool = True
    """With `kernels`, `grouped` and `tiles`: a decoder layer with LoRA in all its projections in one function."""
    packed: bool | None = None
    """With `layers`: frozen weights kept twice more, as products want them. None: on processors with AMX, where that takes a
    sixteenth of main memory at most."""
    last_rows: bool = True
    """The last layer's MLP only where a learned token is predicted."""
    chunked_loss: bool = True
    """Cross-entropy and its gradient a piece at a time, never all logits at once; on a CPU by a compiled function, where it was built."""
    rounded: bool = True
    """Batches filled up so that few shapes of products occur: each new one is compiled by oneDNN."""
    optimizer: bool = True
    """AdamW on a CPU: clipping and the step over all trained tensors in one call, by compiled functions, where they were built."""
    compiled: bool = False
    """Each decoder layer through torch's compiler: half a minute to two at the start, for a few per cent."""

    @classmethod
    def none(cls) -> FastPaths:
        """The reference: every switch off."""
        return cls(**{field.name: False for field in dataclasses.fields(cls)})


def read_fast_paths(value: Any, where: str) -> FastPaths:
    """`value`, true, false or {switch: bool}, as FastPaths. Raises ConfigError that names `where`."""
    if value is None or isinstance(value, bool):
        return FastPaths.none() if value is False else FastPaths()
    names = [field.name for field in dataclasses.fields(FastPaths)]
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be true, false, or switches such as {{attention: false}} (found: {value!r})")
    problems = [f"{where}.{key}: unknown key{did_you_mean(str(key), names)}" for key in value if key not in names]
    problems += [
        f"{where}.{key}: must be true or false (found: {on!r})"
        for key, on in value.items()
        if key in names and not isinstance(on, bool)
    ]
    if problems:
        raise ConfigError(problems, f"the switches are {', '.join(names)}")
    return FastPaths(**value)


def speed_up(model: Any, paths: FastPaths, on_event: OnEvent = log_event) -> Any:
    """Put attention and normalization by `paths` into `model`, the plain base in evaluation or training mode, and return it.

    Only on a CPU; elsewhere torch's own kernels are the fast ones. A model on torch's meta device, which stands for one on the CPU, gets
    what it can have without being tried.
    """
    from phinetune.model.kernels import library

    if model.device.type not in ("cpu", "meta"):
        return model
    tried = True
    if paths.attention and _takes_our_attention(model):
        name = TREES if paths.fused_rows else ATTENTION
        if model.device.type == "meta":
            _set_attention(model, name)
        else:
            tried = _exchange_attention(model, name, on_event)
    if paths.compiled:  # the compiler joins these operators itself
        return model
    if paths.norm:
        _exchange_norms(model, paths.kernels)
    if not paths.kernels or not tried:
        return model
    if library() is not None:
        _exchange_forwards(model, paths.tiles, on_event)
    elif model.device.type == "cpu":
        on_event(Note("training: without phinetune's compiled functions, slower; see phinetune info"))
    return model


def compile_layers(model: Any, on_event: OnEvent = log_event) -> int:
    """Compile each of the model's decoder layers by itself, for any length; the number of layers.

    All layers have one code, so it is compiled once and used for all; what would need too many versions of it runs as it is (torch's
    `recompile_limit`). Attention in blocks, whose loops depend on the lengths, stays outside.
    """
    import torch
    from transformers import AttentionInterface

    for name, function in _functions().items():
        AttentionInterface.register(name, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
    layers = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    largest: Any = max(layers, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])
    for layer in largest:
        layer.compile(dynamic=True)
    on_event(Note(f"model: {len(largest)} layers are compiled in the first step, which takes up to two minutes"))
    return len(largest)


def uses_blocks(model: Any) -> bool:
    """True if `model` computes attention by `attention.py`, so that a tree's lengths may stand in the place of its mask."""
    return model.config._attn_implementation in (ATTENTION, TREES)


def _takes_our_attention(model: Any) -> bool:
    """True if transformers can exchange this model's attention, and it is one that `attention.py` computes."""
    config = model.config.get_text_config()
    dropout = [v for k in ("attention_dropout", "attn_pdrop", "attn_dropout") if (v := getattr(config, k, 0))]
    other = [k for k in ("attn_logit_softcapping", "alibi") if getattr(config, k, None)]
    supports = getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)
    return bool(supports and model._can_set_attn_implementation() and not dropout and not other)


def _functions() -> dict[str, Any]:
    """Our attention functions, by what transformers knows them as."""
    from phinetune.model.attention import attention_forward, trees_forward

    return {ATTENTION: attention_forward, TREES: trees_forward}


def _exchange_attention(model: Any, name: str, on_event: OnEvent) -> bool:
    """Put our attention called `name` into `model` if it computes what torch's does on the model's own queries, keys and values.

    False if the model cannot be tried. Compared layer by layer and not by what the whole model answers: on rare tokens, bfloat16's rounding alone turns answers over.
    """
    was = model.config._attn_implementation
    try:
        difference = _difference(model)
    except Exception as error:  # a foreign model may want anything; it is left as it is
        _set_attention(model, was)
        on_event(Note(f"model: attention is left as it is; it cannot be tried ({first_line(error)})"))
        return False
    same = difference is not None and difference <= _tolerance(model)
    _set_attention(model, name if same else was)
    if not same and difference is not None:
        on_event(Note("model: attention in blocks computes something else than the model's own, left out"))
    return True


def _difference(model: Any) -> float | None:
    """The largest difference of any layer between the two, as a share of the largest number; None if the model calls neither."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    ours = _functions()[ATTENTION]
    found: list[float] = []

    def both(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        expected: torch.Tensor = sdpa_attention_forward(*args, **kwargs)[0]
        made = ours(*args, **kwargs)[0]
        error = float((made - expected).float().abs().max()) if made.shape == expected.shape else math.inf
        found.append(error / max(float(expected.float().abs().max()), 1e-30))
        return expected, None

    _set_attention(model, _BOTH, both)
    _ask(model)
    return max(found, default=None)


def _set_attention(model: Any, name: str, function: Any = None) -> None:
    """Make `model` compute attention by what transformers knows as `name`; `function` is registered under it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from phinetune.model.load import quiet_transformers

    if function := function or _functions().get(name):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)  # masks other than trees are those of torch's attention
    with quiet_transformers():
        model.set_attn_implementation(name)


def _exchange_norms(model: Any, built: bool) -> None:
    """Exchange the normalizations that `norm.stand_in` has tried and can stand in for; `built`: by the compiled functions."""
    from phinetune.model.norm import stand_in

    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            fast = stand_in(module, built)
            if fast is not None:
                setattr(parent, name, fast.train(module.training))


def _exchange_forwards(model: Any, by_tiles: bool, on_event: OnEvent) -> None:
    """Give attentions, MLPs and decoder layers the forwards of `rotary`, `gated` and `residual` where these compute what their own do on the model's own numbers.

    The modules stay, with all they hold; what they compute is looked at once, layer by layer. Without numbers nothing is tried.
    """
    from phinetune.model import gated, residual, rotary

    blocks = uses_blocks(model)
    kinds: list[tuple[Any, list[Any]]] = [
        (
            functools.partial(rotary.forward, by_tiles=by_tiles),
            [m for m in model.modules() if blocks and rotary.could_be_rotary(m)],
        ),
        (gated.forward, [m for m in model.modules() if gated.could_be_gated(m)]),
        (residual.forward, [m for m in model.modules() if residual.could_be_decoder(m)]),
    ]
    forwards = {id(module): functools.partial(forward, module) for forward, found in kinds for module in found}
    found = [module for _, modules in kinds for module in modules if "forward" not in vars(module)]
    if model.device.type != "meta":
        try:
            same = _same_forwards(model, found, forwards)
        except Exception as error:  # a foreign model may want anything; it is left as it is
            on_event(Note(f"model: its layers are left as they are; they cannot be tried ({first_line(error)})"))
            return
        found = [module for module in found if id(module) in same]
    for module in found:
        module.forward = forwards[id(module)]


def _same_forwards(model: Any, modules: list[Any], forwards: dict[int, Any]) -> set[int]:
    """The ids of those `modules` whose own output, for the inputs that they get in the model, is that of `forwards` as well."""
    differences: dict[int, float] = {}
    inside: list[Any] = []

    def compare(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if inside:  # a layer is tried, and calls its parts
            return
        inside.append(module)
        made = forwards[id(module)](*args, **kwargs)
        inside.clear()
        alike = type(made) is type(output)
        expected, made = (x[0] if isinstance(x, tuple) else x for x in (output, made))
        error = float((made - expected).float().abs().max()) if alike and made.shape == expected.shape else math.inf
        share = error / max(float(expected.float().abs().max()), 1e-30)
        differences[id(module)] = max(share, differences.get(id(module), 0.0))

    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in modules]
    try:
        _ask(model)
    finally:
        for handle in handles:
            handle.remove()
    return {key for key, difference in differences.items() if difference <= _tolerance(model)}


def _ask(model: Any) -> None:
    """Run `model` on a few tokens, in evaluation mode and without a cache."""
    import torch

    training = model.training
    model.eval()
    try:
        ids = torch.arange(2, 26).remainder(model.config.get_text_config().vocab_size).view(2, 12)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        model.train(training)


def _tolerance(model: Any) -> float:
    """The largest difference that rounding explains, as a share of the largest number."""
    import torch

    return 1e-3 if model.dtype == torch.float32 else 0.05
