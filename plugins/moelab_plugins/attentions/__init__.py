"""Attentions: which earlier positions a query sees, and how far away it takes them to be."""
