"""Experiments: a question and a rule declared before the first run, and what came of them."""
