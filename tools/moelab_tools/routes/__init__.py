"""What the commands of routes share: which text, which model, their tables, studies and pages."""
