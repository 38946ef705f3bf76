"""Speed on the device that is here: of decoding a model, and of each operation on pages."""
