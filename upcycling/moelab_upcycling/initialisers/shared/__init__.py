"""`recipe.shared`: dense FFN neurons -> the shared expert of one layer."""
