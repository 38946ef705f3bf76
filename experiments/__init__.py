"""What measures the method: command line, tasks, runs, comparisons, statistics, tables, plots, benchmarks.

What may change here: which measurements exist, how they are run, saved and shown. How a model decodes is
`retro_jax`'s matter; nothing here is imported by the other packages.

Its folder stands beside `retro_jax`, and its name within: `experiments` is a name that users' projects have.
"""

if __name__ != "retro_jax.experiments":
    raise ImportError(f"this package is imported as retro_jax.experiments, not as {__name__}")
