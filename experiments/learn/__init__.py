"""Training a page score on a model's own attention: `retro-jax learn`.

What may change here: what is trained towards what, by which schedule, and what a folder of training holds.
How a learned score is computed when a model decodes is `retro_jax.learned`'s matter.
"""
