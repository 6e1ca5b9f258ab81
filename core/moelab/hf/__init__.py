"""Hugging Face checkpoints of Qwen2 and Qwen2-MoE: the only place that knows their names, fields and files."""
