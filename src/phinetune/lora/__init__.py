"""LoRA: layers with their autograd function, putting them into a model, adapter files in PEFT's format, merging.

Depends on torch and safetensors only; knows nothing of data, training or terminals.
"""
