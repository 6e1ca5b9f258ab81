"""Activations: what stands between the matrices of every feed-forward part."""
