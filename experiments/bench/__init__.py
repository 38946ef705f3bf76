"""Speed on the device that is here: of decoding a model, and of each operation on pages.

What may change here: what is timed, how, and beside which other programs.
"""
