"""What types read and write, and what it may cost to validate a body."""
