"""Studies: the same configurations on several models and kinds of text, kept as block means; their tables.

What may change here: which configurations a study has (`variants`), and how it is shown. Each model and kind
of text is a comparison of its own (`retro_jax.experiments.compare`), in a folder that continues after a kill.
"""
