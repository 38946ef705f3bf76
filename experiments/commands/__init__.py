"""Commands whose flags are shown at once: their work, and JAX with it, is imported when it begins."""
