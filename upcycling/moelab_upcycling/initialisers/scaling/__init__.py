"""`recipe.scaling`: the factors on the routed experts."""
