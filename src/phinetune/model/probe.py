"""What a model says after the prompt contract's probe texts: the logits of the next token, to tell two models apart or prove them equal.

Taken when an adapter is trained and kept with it, so that later it can be seen whether a base model, a merge or a quantization gives
what the training had. Not here: generating text, scoring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phinetune.model.contract import PromptContract

if TYPE_CHECKING:
    import torch

_KEPT = 64  # largest logits of each probe that are kept


def probe_logits(model: Any, contract: PromptContract) -> torch.Tensor:
    """(probes, vocabulary), float32: the next token's logits after each probe text, in eval mode."""
    import torch

    was_training = model.training
    model.eval()
    rows = []
    with torch.inference_mode():
        for probe in contract.probes:
            ids = torch.tensor([list(probe.ids)], device=model.device)
            rows.append(model(input_ids=ids, logits_to_keep=1).logits[0, -1].float().cpu())
    model.train(was_training)
    return torch.stack(rows)


def record_logits(logits: torch.Tensor) -> list[dict[str, Any]]:
    """The largest logits of each probe, for a manifest: token ids and values."""
    values, ids = logits.topk(min(_KEPT, logits.shape[1]))
    return [
        {"ids": i.tolist(), "logits": [round(v, 5) for v in row.tolist()]} for i, row in zip(ids, values, strict=True)
    ]


def distance(logits: torch.Tensor, recorded: list[dict[str, Any]]) -> float:
    """Root mean square difference from recorded logits, at their ids, after taking off each row's mean (which no softmax sees)."""
    import torch

    total, count = 0.0, 0
    for row, kept in zip(logits, recorded, strict=True):
        here, then = row[torch.tensor(kept["ids"])], torch.tensor(kept["logits"])
        gap = (here - here.mean()) - (then - then.mean())
        total, count = total + float((gap * gap).sum()), count + len(kept["ids"])
    return float((total / max(count, 1)) ** 0.5)
