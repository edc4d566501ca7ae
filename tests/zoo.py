"""Tiny random causal language models of twelve families, built in code: what adapters must fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_LLAMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}
_SHORT = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_GPT2 = {
    **_SHORT,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_OPT = {
    **_SHORT,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
}
_BLOOM = {**_SHORT, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_FALCON = {**_SHORT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True}

_ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {**_LLAMA, "original_max_position_embeddings": 64, "sliding_window": None}),
    "phi": ("Phi", {**_LLAMA, "num_key_value_heads": 4}),
    "llama": ("Llama", _LLAMA),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3", _GEMMA),
    "gpt2": ("GPT2", _GPT2),
    "opt": ("OPT", _OPT),
    "falcon": ("Falcon", _FALCON),
    "bloom": ("Bloom", _BLOOM),
}
MODELS = list(_ZOO)
"""Names that `zoo_model` takes."""
EMBEDDING = {"phi3": "embed_tokens", "gpt2": "wte", "falcon": "word_embeddings", "bloom": "word_embeddings"}
"""Last part of the token embedding's name, where it is not `embed_tokens`."""


def zoo_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """The model called `name`, two layers wide 32, in float32 and evaluation mode. The same seed gives the same weights."""
    import transformers

    family, values = _ZOO[name]
    config_class = "Gemma3TextConfig" if name == "gemma3" else f"{family}Config"
    model_class = f"{family}LMHeadModel" if name == "gpt2" else f"{family}ForCausalLM"
    config = getattr(transformers, config_class)(**{**values, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():  # larger than the usual start: logits differ visibly
            std = 0.5 if "embed" in parameter_name or "wte" in parameter_name else 0.15
            if parameter.dim() > 1:
                parameter.normal_(std=std, generator=generator)
            elif parameter_name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def embedding_of(name: str) -> str:
    """Last part of the name of the token embedding."""
    return EMBEDDING.get(name, "embed_tokens")


def unfused_phi3(phi3: Any) -> Any:
    """A Llama model with the weights of a Phi-3 model, its fused projections taken apart."""
    state = dict(phi3.state_dict())
    size, middle = 32 // 4, 48
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        rows = state.pop(f"{attention}.qkv_proj.weight").split([4 * size, 2 * size, 2 * size])
        state |= {f"{attention}.{p}_proj.weight": w for p, w in zip("qkv", rows, strict=True)}
        gate, up = state.pop(f"{mlp}.gate_up_proj.weight").split([middle, middle])
        state |= {f"{mlp}.gate_proj.weight": gate, f"{mlp}.up_proj.weight": up}
    llama = zoo_model("llama", seed=99)
    llama.load_state_dict(state)
    return llama


class Cnn(nn.Module):
    """Two-dimensional convolutions, with stride and padding, a norm with buffers, a linear head. x (N, 3, 8, 8) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, (1, 3), stride=(1, 2), padding=(0, 1), bias=False)
        self.head = nn.Linear(8 * 4 * 2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.norm(self.first(x))))).flatten(1))


class Waves(nn.Module):
    """One- and three-dimensional convolutions. x (N, 4, 12) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 5, stride=2, padding=2)
        self.volume = nn.Conv3d(2, 4, 3, padding=1)
        self.head = nn.Linear(4 * 18, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.line(x)).view(-1, 2, 3, 3, 2)
        return self.head(torch.tanh(self.volume(y)).flatten(1))


class Bag(nn.Module):
    """An embedding and a linear classifier. x (N, T) of token ids below 20 -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.emb(x)).mean(1))


class Fused(nn.Module):
    """One linear layer that is three, of unequal widths. x (N, 10) -> (N, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(10, 8 + 4 + 4)
        self.out = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.wqkv(x).split([8, 4, 4], dim=-1)
        return self.out(torch.tanh(q) + torch.cat([k, v * 2], dim=-1))
