"""Training data made of what models say: `moelab synthesise`."""
