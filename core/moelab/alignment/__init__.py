"""Post-training through TRL: what its trainers can't see of a model with experts, and `moelab align`."""
