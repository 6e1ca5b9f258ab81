"""`moelab merge`: several checkpoints of one model become one, expert by expert."""
