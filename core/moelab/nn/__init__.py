"""The transformer: Qwen2 dense and Qwen2-MoE in one decoder."""
