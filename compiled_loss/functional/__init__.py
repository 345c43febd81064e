"""The stateless losses, one family a file."""
