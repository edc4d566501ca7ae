"""May this model be trained on tree batches? Only if giving it positions and a mask is all that its layers look at.

Sliding windows, local or linear attention, convolutions, recurrences and ALiBi look at a token's place in the row instead. They are
told apart by the config, and, for what the config does not tell, by a probe on the model itself: with two branches in one row, other
tokens in one must not move the other's logits at all, and each must answer as it does alone.
"""

from __future__ import annotations

import inspect
from typing import Any

from phinetune.data.batches import Layout, padded_batch, tree_batch
from phinetune.errors import ConfigError
from phinetune.events import Note, OnEvent, log_event
from phinetune.model.fast import uses_blocks
from phinetune.training.rows import tree_mask

_LOCAL = ("attention_types", "window_size", "block_types", "layers_block_type", "alibi")


def choose_layout(model: Any, asked: Layout, longest: int, on_event: OnEvent = log_event) -> Layout:
    """`asked`, or "padded" where the tree would compute something else. `longest` is the longest example, in tokens.

    Raises ConfigError if "tree" was asked for by name and this model cannot have it.
    """
    if asked == "padded":
        return asked
    reason = padded_reason(model, longest) or _probe_reason(model)
    if reason is None:
        return asked
    if asked == "tree":
        raise ConfigError(
            f"training_config.layout: this model cannot be trained on tree batches: {reason}", "use auto or padded"
        )
    on_event(Note(f"training: padded batches, {reason}"))
    return "padded"


def padded_reason(model: Any, longest: int) -> str | None:
    """Why the tree is not for this model, as far as its config tells; `longest` as in `choose_layout`. None if nothing speaks against it."""
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "the model takes no position_ids"
    if config._attn_implementation not in ("eager", "sdpa") and not uses_blocks(model):
        return f"{config._attn_implementation} takes no mask of this shape"
    if others := {t for t in getattr(config, "layer_types", None) or [] if t != "full_attention"}:
        return f"the model has layers of {', '.join(sorted(others))}"
    if local := [name for name in _LOCAL if getattr(config, name, None)]:
        return f"the model's attention is local ({local[0]})"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) is not False and window < longest:
        return f"its sliding window of {window} tokens is shorter than the longest example"
    return None


def _probe_reason(model: Any) -> str | None:
    import torch

    def rows(first: int) -> list[dict[str, Any]]:
        branches = ([first, first + 1, first + 2], [11, 12, 13, 14])
        return [{"input_ids": [3, 5, 7, *b], "labels": [-100] * 4 + [*b[1:]]} for b in branches]

    def tree_logits(first: int) -> torch.Tensor:
        batch = {k: v.to(model.device) for k, v in tree_batch(rows(first)).items()}
        mask = tree_mask(model, batch["tree"], model.dtype)
        ids, positions = batch["input_ids"], batch["position_ids"]
        out = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        last: torch.Tensor = out.logits[0, -4:].float()
        return last

    training = model.training
    model.eval()  # no dropout
    try:
        with torch.no_grad():
            one, other = tree_logits(20), tree_logits(30)
            alone = padded_batch(rows(20)[1:], 0)["input_ids"].to(model.device)
            expected = model(input_ids=alone, use_cache=False).logits[0, -4:].float()
    except Exception as error:  # a foreign model may break in any way on a mask it does not know
        return f"the model does not take them ({type(error).__name__})"
    finally:
        model.train(training)
    if not torch.equal(one, other):
        return "one example would see another"
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.05
    if float((one - expected).abs().max()) > tolerance * float(expected.abs().max()):
        return "an example would be computed differently than alone"
    return None
