"""Hugging Face checkpoints: names, config.json and safetensors files, in and out. Only this package knows them."""
