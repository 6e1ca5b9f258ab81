"""Expert backends: how the experts are computed."""
