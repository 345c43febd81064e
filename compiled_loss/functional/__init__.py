"""The stateless losses, one family per file."""
