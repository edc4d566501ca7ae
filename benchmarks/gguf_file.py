"""A Llama-architecture model folder as a GGUF file for llama.cpp, with the `gguf` package that llama.cpp publishes.

Weights in float16, to be quantized by llama.cpp itself; no vocabulary: benchmarks hand token ids over. Not here: other architectures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path, file: Path) -> None:
    """Write the Llama model in `folder` as `file`. Raises ValueError for another architecture."""
    import gguf
    import numpy as np
    import torch
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise ValueError(f"{folder}: is {config['model_type']}, only llama is written here")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    with safe_open(str(folder / "model.safetensors"), "pt") as source:
        for name in source.keys():  # noqa: SIM118 - it is no dictionary
            values = source.get_tensor(name).to(torch.float32).numpy()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = _paired(values, heads if "q_proj" in name else groups)
            kept = np.float32 if values.ndim == 1 else np.float16
            writer.add_tensor(_gguf_name(name), values.astype(kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed or name == "lm_head.weight":
        return fixed.get(name, "output.weight")
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _paired(weight: Any, heads: int) -> Any:
    """Rows of a head as llama.cpp rotates them, neighbours by twos, from transformers' halves."""
    out, inputs = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, inputs).swapaxes(1, 2).reshape(out, inputs)


def _rope_theta(config: dict[str, Any]) -> float:
    return float(config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta"))


def quantize_gguf(source: Path, target: Path, kind: str = "Q4_1", threads: int = 0) -> None:
    """llama.cpp's own quantization of `source`, every product at `kind`, the output layer too."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.nthread, options.pure = threads, True
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options)
    if code:
        raise RuntimeError(f"llama.cpp could not quantize {source} (code {code})")
