"""Rope scalings: how the rotary embedding reaches beyond the length that a model was trained on."""
