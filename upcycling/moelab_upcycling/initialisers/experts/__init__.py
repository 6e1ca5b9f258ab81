"""`recipe.experts`: dense FFN neurons -> the routed experts of one layer."""
