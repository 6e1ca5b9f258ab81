"""Configuration: dataclasses, YAML layers, overrides, and messages that name the file and the key."""
