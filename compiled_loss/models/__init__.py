"""Access to a model and to its output: the head, hidden states, the weight of an auxiliary loss."""
