"""Training on `transformers.Trainer`: its vocabulary as `training_config`, our loss, adapter checkpoints, exact resume.

Does not know how the model was loaded, what LoRA is inside, or that there are terminals.
"""
