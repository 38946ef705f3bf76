"""Models as they load fastest: the command `convert`.

What may change here: how it talks to a user; the folder is `retro_jax.models.formats.converted`'s.
"""
