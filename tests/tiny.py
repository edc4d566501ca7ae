"""Tiny random models and a tokenizer, built in code: what most tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

PHI_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_CORPUS = [
    "What is the tone of this phrase? joy sadness fear surprise",
    "the quick brown fox jumps over the lazy dog",
    "Hello, how are you?",
]


def tiny_tokenizer(chat_template: str | None = PHI_TEMPLATE) -> Any:
    """A byte-level BPE tokenizer of 320 tokens with Phi-3's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": _SPECIAL[1:]})
    fast.chat_template = chat_template
    return fast


def tiny_model(kind: str = "llama", tie: bool = False, seed: int = 0) -> Any:
    """A random two-layer model with grouped-query attention: llama (separate projections) or phi3 (fused ones). float32."""
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": tie,
    }
    if kind == "phi3":
        model: Any = Phi3ForCausalLM(Phi3Config(original_max_position_embeddings=256, sliding_window=None, **common))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    for name, parameter in model.named_parameters():  # larger than the usual start, so that logits differ visibly
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12 if "embed" not in name else 0.5)
    return model.eval()


def tiny_folder(
    folder: Path,
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    tie: bool = False,
    chat_template: str | None = PHI_TEMPLATE,
) -> Path:
    """A complete model folder."""
    tiny_model(kind, tie).to(dtype).save_pretrained(str(folder))
    tiny_tokenizer(chat_template).save_pretrained(str(folder))
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tone_rows(count: int = 24) -> list[dict[str, Any]]:
    """Rows with a phrase and a tone, of uneven lengths, all phrases distinct."""
    tones = ["joy", "sadness", "fear", "surprise"]
    return [{"phrase": f"phrase number {i} " + "and so on " * (i % 5), "tone": tones[i % 4]} for i in range(count)]


PROMPT = {"prompt": "What is the tone of this phrase? {phrase}", "completion": "{tone}"}
