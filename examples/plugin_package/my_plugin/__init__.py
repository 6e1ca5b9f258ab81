"""Parts for moelab."""
