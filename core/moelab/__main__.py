"""`python -m moelab` is the command line of the package above, named here as a string only."""

from importlib import import_module

import_module("moelab_tools.cli").main()
