"""A base model with Phi-3-mini's shapes and random bfloat16 weights, for benchmarks of memory and merging. Nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""Last parts of the names of the layers that `all-linear` adapts."""


def make_base(folder: Path, layers: int = 32) -> Path:
    """`folder`/base-`layers`: hidden 3072, intermediate 8192, 32 heads, vocabulary 32064, in four files; made once.

    With 32 layers 3.8 B parameters, 7.6 GB.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Phi3Config

    base = folder / f"base-{layers}"
    if (base / "done").exists():
        return base
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    config = Phi3Config(num_hidden_layers=layers, dtype="bfloat16", tie_word_embeddings=False)
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(str(base))
    every = shapes(base)
    names = list(every)
    files = [f"model-{i + 1:05d}-of-00004.safetensors" for i in range(4)]
    step = -(-len(names) // 4)
    where, total = {}, 0
    torch.manual_seed(0)
    for i, file in enumerate(files):
        part = {n: torch.randn(every[n], dtype=torch.bfloat16) * 0.02 for n in names[i * step : (i + 1) * step]}
        save_file(part, str(base / file), metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
        total += sum(t.nbytes for t in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "done").touch()
    return base


def shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model in `base`, which need not have weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(base)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
