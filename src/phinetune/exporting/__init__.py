"""From a merged model to a verified ONNX folder. Knows nothing of training."""
