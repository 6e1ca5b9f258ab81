"""Observers: what looks at a run between its steps."""
