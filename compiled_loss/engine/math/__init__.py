"""The elementwise mathematics of logits."""
