"""Surgery on the experts of a trained checkpoint: plans carried out on weights, moments, router and config together."""
