"""How a linear loss is chunked: the option, the plan, its cost, and an explanation of it."""
