"""Data sources: where the text comes from."""
