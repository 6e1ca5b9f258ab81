"""Training: one step, the loop around it, schedules, checkpoints, and what is measured on the way."""
