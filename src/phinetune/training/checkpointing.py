"""Activation checkpointing of some decoder layers: what they computed is thrown away and computed again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.1, with a layer as the segment. A checkpointed layer keeps its
input, (batch, T, hidden), and costs one more forward pass of its own; gradients are the same bits, as dropout draws the same numbers again.

The first layers are taken, not the last. Memory is fullest where the backward pass begins: all that the other layers keep, and the output
layer's logits. Those other layers give their activations back before the backward pass comes down to the checkpointed ones, so that
computing one again adds to nothing. Were the last layers checkpointed, the first of them to be computed again, all its activations, would
come on top of everything that the layers below still keep.

Not here: how many layers to take.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

from phinetune.errors import ConfigError
from phinetune.events import Note, OnEvent, log_event

LayerCount = int | Literal["all"]
"""How many layers are checkpointed; 0 for none."""
CHECKPOINTING_KEYS = (
    "checkpoint_layers",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
)
"""Keys of training_config that `read_checkpointing` reads: ours, and those of transformers since 5.21 and before, for all layers or none."""
_OPTIONS = ("preserve_rng_state", "determinism_check", "debug", "early_stop")


def read_checkpointing(
    given: dict[str, Any], on_event: OnEvent = log_event
) -> tuple[LayerCount | None, dict[str, Any]]:
    """(how many layers, None where nothing is said; arguments for `torch.utils.checkpoint.checkpoint`) from keys of training_config.

    Raises ConfigError for what is neither a whole number nor "all", and for keys that contradict each other.
    """
    problems: list[str] = []
    count, asked_by = given.get("checkpoint_layers"), "checkpoint_layers"
    if count is not None and count != "all" and (type(count) is not int or count < 0):
        wanted = 'must be a whole number, 0 or above, or "all"'
        problems.append(f"training_config.checkpoint_layers: {wanted} (found: {count!r})")
    options: dict[str, Any] = {}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        switch, kwargs = given.get(name), given.get(f"{name}_kwargs")
        if switch is not None and not isinstance(switch, bool):
            problems.append(f"training_config.{name}: must be true or false (found: {switch!r})")
        elif switch is not None and count not in (None, "all" if switch else 0):
            was = "all layers" if switch else "none"
            problems.append(
                f"training_config.{name}: {switch!r}, {was}, contradicts {asked_by} {count!r}; leave one out"
            )
        elif switch is not None:
            count, asked_by = "all" if switch else 0, name
        if kwargs is not None and not isinstance(kwargs, dict):
            problems.append(f"training_config.{name}_kwargs: must hold key: value pairs (found: {kwargs!r})")
            continue
        options |= _options(f"training_config.{name}_kwargs", kwargs or {}, on_event)
    if problems:
        raise ConfigError(problems)
    return count, options


def _options(key: str, kwargs: dict[str, Any], on_event: OnEvent) -> dict[str, Any]:
    if kwargs.get("use_reentrant"):
        message = f"{key}.use_reentrant: true cannot train adapters on a frozen base, using false"
        on_event(Note(message, warning=True))
    for name in kwargs:
        if name not in (*_OPTIONS, "use_reentrant"):
            on_event(Note(f"{key}.{name}: has no effect, training_config.checkpoint_layers says which layers"))
    return {name: value for name, value in kwargs.items() if name in _OPTIONS}


def check_layer_count(count: LayerCount | None, layers: int | None) -> None:
    """Raises ConfigError if `count` is more than the `layers` that a model has; None if that is not known."""
    if isinstance(count, int) and layers is not None and count > layers:
        raise ConfigError(
            f"training_config.checkpoint_layers: {count}, but the model has {layers} layers",
            f'use {layers} or less, or "all"',
        )


def checkpoint_layers(
    model: Any, count: LayerCount, options: dict[str, Any] | None = None, on_event: OnEvent = log_event
) -> int:
    """Checkpoint the first `count` decoder layers of `model` that keep anything, but the last, and no others; return how many those are.

    Layers below the lowest one with a trained parameter keep nothing and are passed over. It works in train mode only, as transformers has
    it. `options`: arguments of `torch.utils.checkpoint.checkpoint`. Raises ConfigError for a count above the number of layers, and for a model that cannot be checkpointed.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    again = functools.partial(checkpoint, use_reentrant=False, **(options or {}))
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        return _by_the_models_own_code(model, count, again, on_event)
    check_layer_count(count, len(layers))
    lowest = 0 if _trains(model.get_input_embeddings()) else next((i for i, m in enumerate(layers) if _trains(m)), 0)
    stop = len(layers) - 1 if count == "all" else min(lowest + count, len(layers) - 1)
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = lowest <= i < stop
        layer._gradient_checkpointing_func = again
    return max(stop - lowest, 0)


def _trains(module: Any) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _by_the_models_own_code(model: Any, count: LayerCount, again: Any, on_event: OnEvent) -> int:
    """For code that came with a model's folder: transformers' older way, which knows only all layers or none."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    check_layer_count(count, layers)
    if not count:
        return 0
    try:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=again)
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            f"training_config.checkpoint_layers: {type(model).__name__} cannot be checkpointed",
            "leave it out, and gradient_checkpointing, too",
        ) from None
    if count not in ("all", layers):
        on_event(
            Note("training_config.checkpoint_layers: this model's own code checkpoints all layers or none, taking all")
        )
    return layers or 0
