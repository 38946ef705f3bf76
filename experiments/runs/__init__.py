"""Named runs: a model, a task and methods, from the plan to a folder of results."""
