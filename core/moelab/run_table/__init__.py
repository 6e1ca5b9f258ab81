"""Run folders as records: found under a folder, read without torch, selected, sorted, and as a pandas DataFrame."""
