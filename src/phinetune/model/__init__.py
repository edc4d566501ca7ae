"""Base models: finding and checking their folder, loading them for this machine, the prompt contract, saving.

Knows nothing of LoRA or data files.
"""
