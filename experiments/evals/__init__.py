"""Tasks of the Language Model Evaluation Harness (lm-eval), answered by this library's decoding.

`scoring` finds how likely continuations are; `language_model` is the harness's model around that and
`generate_many`, which `arguments` reads from the harness's own command line (`python -m
retro_jax.experiments.evals`); `command` and `harness` are `retro-jax eval`.

What may be changed here: how requests are batched. What is asked, and what counts as right, is lm-eval's.
"""
