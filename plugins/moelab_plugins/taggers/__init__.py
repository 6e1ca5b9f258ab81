"""What `moelab data` notes of a document beside its domain."""
