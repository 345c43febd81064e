"""What losses ask of a model and of its output."""
