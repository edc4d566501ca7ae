"""Text from a model: one protocol, two backends (torch, ONNX Runtime GenAI). Knows nothing of evaluation or HTTP."""
