"""`ExportConfig`: precision and quantization of the ONNX model, in our words; `build.py` knows the builder's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from phinetune.config import STRICT


@dataclass(frozen=True)
class ExportConfig:
    """How the ONNX model is built."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    precision: Literal["int4", "fp16", "fp32"] = "int4"
    """Precision of the weights: int4 (blocks of 4-bit integers with a scale each), fp16 or fp32."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """int4: weights that share one scale."""
    symmetric: bool = True
    """int4: no zero point per block."""
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    """int4: lowest precision of the activations in the products: 4 int8, 3 bf16, 2 fp16, 1 fp32, 0 the runtime's choice."""
    algorithm: Literal["default", "rtn", "k_quant", "k_quant_mixed"] = "default"
    """int4: how scales are chosen; k_quant_mixed keeps the output layer and the most sensitive layers at 8 bits."""
    execution_provider: Literal["cpu", "cuda", "dml", "webgpu"] = "cpu"
    """Where the model will run."""
