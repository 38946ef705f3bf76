"""Named runs: a model, a task and methods, from the plan to a folder of results.

What may change here: which runs have names (`configs`), how work is shared and kept. Results of a folder stay
as they are.
"""
