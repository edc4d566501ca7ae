"""How good a model is at the task: metrics from text, intervals, stage tables. Knows nothing of ONNX or workflows."""
