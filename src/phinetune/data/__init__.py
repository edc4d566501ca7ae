"""From files to training examples: records, conversations, token ids with labels, batches, and the ledger of what became of each row.

Knows nothing of models or training: the tokenizer and template come in as a `ChatEncoder`.
"""
