"""Upcycling: dense Qwen2 weights become expert weights, without building a model."""
