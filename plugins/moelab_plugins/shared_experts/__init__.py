"""Shared experts: what every token passes through."""
