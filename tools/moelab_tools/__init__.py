"""What one runs around training: the command line and its commands."""
