"""Text to batches: documents, tokenizers, corpora, and the order in which they are read."""
