"""The built-in components, one file each: the file is named as the config names it."""
