"""Predictions from a config alone, nothing allocated: memory, traffic, and what costs what another model does."""
