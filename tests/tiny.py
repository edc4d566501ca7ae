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


_LONG = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 20.0],
    },
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 256, "sliding_window": None}),
    "long": ("Phi3", {"sliding_window": None, **_LONG}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}),
    "window": ("Phi3", {"original_max_position_embeddings": 256, "sliding_window": 50}),
    "mistral": ("Mistral", {"sliding_window": 50}),
    "olmo": ("Olmo", {"num_key_value_heads": 4}),
    "phi": ("Phi", {"num_key_value_heads": 4}),
}


def tiny_model(kind: str = "llama", tie: bool = False, seed: int = 0) -> Any:
    """A random two-layer model with grouped-query attention: llama (separate projections), phi3 (fused ones), long (phi3 with two lists
    of rotary factors), qwen3 (norms of queries and keys), gemma (scaled embeddings), gemma2 (sliding windows), olmo, phi. float32."""
    import transformers

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
    family, changes = _FAMILIES[kind]
    config = getattr(transformers, f"{family}Config")(**{**common, **changes})
    model: Any = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # larger than the usual start, so that logits differ visibly
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12 if "embed" not in name else 0.5)
        elif kind not in ("llama", "phi3") and "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
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


def build_here(source: Path, target: Path, config: Any, trust_remote_code: bool = False, on_event: Any = None) -> None:
    """`phinetune.exporting.build.build_onnx` in this process, in a tenth of the time: the builder need not be started and imported."""
    import contextlib
    import io
    import runpy
    import sys
    import tempfile
    from unittest import mock

    from phinetune.exporting.build import option_words

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        arguments = ["builder", "-i", str(source), "-o", str(target), "-p", config.precision]
        arguments += [
            "-e",
            config.execution_provider,
            "-c",
            scratch,
            "--extra_options",
            *option_words(config, trust_remote_code),
        ]
        stack.enter_context(mock.patch.object(sys, "argv", arguments))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tone_rows(count: int = 24) -> list[dict[str, Any]]:
    """Rows with a phrase and a tone, of uneven lengths, all phrases distinct."""
    tones = ["joy", "sadness", "fear", "surprise"]
    return [{"phrase": f"phrase number {i} " + "and so on " * (i % 5), "tone": tones[i % 4]} for i in range(count)]


PROMPT = {"prompt": "What is the tone of this phrase? {phrase}", "completion": "{tone}"}
