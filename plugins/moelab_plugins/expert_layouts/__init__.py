"""Expert layouts: how many experts a layer has, and how wide."""
