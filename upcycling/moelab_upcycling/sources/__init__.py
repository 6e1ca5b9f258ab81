"""Dense models that can be read, one file a kind: which fields express it, and what its tensors are called."""
