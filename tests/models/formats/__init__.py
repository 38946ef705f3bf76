"""The formats that models come in."""
