"""Everything about text: tasks, tokenizers, batches, metrics, downloads."""
