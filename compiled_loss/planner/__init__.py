"""The chunking of linear losses: the option, the plan, its cost, and an explanation of it."""
