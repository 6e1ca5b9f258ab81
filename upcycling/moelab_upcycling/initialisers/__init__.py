"""The built-in initialisers, one file each, by axis of the recipe."""
