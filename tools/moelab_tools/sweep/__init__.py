"""Several runs from one command: variants times seeds, checked, run, resumed and compared."""
