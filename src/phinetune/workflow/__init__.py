"""The stages as functions: finetune, evaluate, merge, export, and quickstart that runs them all. What commands and passes call."""
