"""What measures the method: the command line, comparisons, their statistics, tables and plots, benchmarks.

What may change here: which measurements exist, how they are run, saved and shown. How a model decodes is
`retro_jax`'s matter; nothing here is imported by the other packages.
"""
