"""Mixture-of-experts layers: routing, dispatch, experts, and the contracts of their swappable parts."""
