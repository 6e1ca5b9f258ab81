"""`moelab evaluate --length`: what is measured, how it is told, where it is kept, and what TensorBoard shows of it."""
