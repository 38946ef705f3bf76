"""Parity with Hugging Face transformers, loading, tokenizers, and what bad input gives."""
