"""Text filters: which documents are kept, and how their text is put in order."""
