"""The choice: which kernel runs each node, in which formats, where in memory, and why."""
