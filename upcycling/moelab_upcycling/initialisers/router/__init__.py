"""`recipe.router`: the router matrix of one layer."""
