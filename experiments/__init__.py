"""What measures the method: command line, tasks, runs, comparisons, statistics, tables, plots, benchmarks.

What may change here: which measurements exist, how they are run, saved and shown. How a model decodes is
`retro_jax`'s matter; nothing here is imported by the other packages.
"""
