"""`ExportConfig`: precision, quantization and shape of the ONNX model, in our words; `build.py` knows the builder's, `options.py` what
cannot be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from phinetune.config import STRICT
from phinetune.model.grid import Grid

OURS = ("auto", "gptq", "searched", "mixed")
"""Algorithms whose codes are put into the graph that the builder made with its default one."""


@dataclass(frozen=True)
class ExportConfig:
    """How the ONNX model is built."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    precision: Literal["int4", "int8", "bf16", "fp16", "fp32"] = "int4"
    """Precision of the weights: int4 or int8 (blocks of integers with a scale each), bf16 (cuda only), fp16 or fp32."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """int4, int8: weights that share one scale."""
    symmetric: bool = True
    """int4, int8: no zero point per block (the k_quant algorithms have one always)."""
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    """int4, int8: lowest precision of the activations in the products: 4 int8, 3 bf16, 2 fp16, 1 fp32, 0 the runtime's choice."""
    algorithm: Literal[
        "auto", "gptq", "searched", "mixed",
        "default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed", "k_quant_linear",
    ] = "auto"  # fmt: skip
    """int4, int8: how codes and scales are chosen. Ours: gptq (rounding errors made up for, on examples of the training), searched (scales that lose least), mixed (int4 only: gptq, and 8 bits for the layers whose rounding changes the answers most, within size_budget), auto (the nearest codes for an adapter trained for them, else gptq, mixed or searched, whichever first keeps the answers). The builder's: default (the nearest codes), the others; int4 only: _last keeps the output layer at 8 bits, _mixed also the most sensitive layers, _linear also linear attention."""
    size_budget: float = 1.02
    """mixed: most bytes that the integers and their scales may take, as a multiple of what they take with 4 bits everywhere."""
    tune: bool = False
    """int4, int8: take the block size and the accuracy level that answer fastest on this CPU, as measured here, of those that stay within max_drop, and write the best number of threads into genai_config.json."""
    calibration_examples: int = 128
    """gptq, searched, mixed: at most so many examples to weigh errors by."""
    calibration_data: str | dict[str, Any] | None = None
    """gptq, searched, mixed: a file of examples, or fields of data; by default the examples of the training. What it does not say is as in training."""
    max_drop: float | Literal["any"] | None = None
    """int4, int8: most that held-out answers may lose, as a share: points of exact answers, or perplexity where answers are free text. More is an error. "any": it is only said. By default 0.01, and "any" in a workflow, whose evaluators and goals judge."""
    execution_provider: Literal["cpu", "cuda", "dml", "webgpu"] = "cpu"
    """Where the model will run."""
    op_types_to_quantize: tuple[Literal["MatMul", "Gather"], ...] | None = None
    """int4, int8: MatMul (the linear layers), Gather (input embedding, int4 only); by default MatMul, and both where the embeddings share a weight."""
    nodes_to_exclude: tuple[str, ...] = ()
    """int4, int8: products of the graph that stay in floating point, such as /lm_head/MatMul."""
    use_qdq: bool = False
    """int4: DequantizeLinear and MatMul in place of MatMulNBits; for the default algorithm."""
    use_8bits_moe: bool = False
    """int4: experts of a mixture-of-experts model at 8 bits."""
    use_webgpu_fp32: bool = False
    """webgpu: activations in fp32, for devices without fp16."""
    use_cuda_bf16: bool = False
    """int4 on cuda: activations in bf16."""
    enable_cuda_graph: bool = False
    """cuda: capture the whole step as one CUDA graph."""
    exclude_embeds: bool = False
    """Leave the input embedding out: the model takes inputs_embeds. It does not answer prompts by itself."""
    exclude_lm_head: bool = False
    """Leave the output layer out: the model gives hidden_states. It does not answer prompts by itself."""
    include_hidden_states: bool = False
    """Give the last hidden_states beside the logits."""
    search: dict[str, Any] | None = None
    """Put into "search" of genai_config.json, what runtimes start generating with: max_length, min_length, repetition_penalty, ..."""
    extra_options: dict[str, Any] | None = None
    """Further options of the installed onnxruntime-genai model builder, by its own names. That they took effect is not verified."""

    @property
    def quantized(self) -> bool:
        """The weights are integers."""
        return self.precision in ("int4", "int8")

    @property
    def grid(self) -> Grid | None:
        """What the weights are rounded to; None for floating point."""
        if not self.quantized:
            return None
        return Grid(8 if self.precision == "int8" else 4, self.block_size, self.symmetric)

    @property
    def as_built(self) -> ExportConfig:
        """What the builder is asked for: its own algorithm where codes are put in afterwards."""
        return replace(self, algorithm="default") if self.algorithm in OURS else self

    @property
    def answers_prompts(self) -> bool:
        """Token ids go in and logits come out."""
        return not (self.exclude_embeds or self.exclude_lm_head)
