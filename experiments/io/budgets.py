"""Budgets as one number: up to 1 a share of the context, above it tokens."""

from retro_jax.fields import DecodeFields


def budget_fields(value: float) -> dict:
    """Returns the fields of `DecodeConfig` for a budget.

    Raises:
      ValueError: it is neither a share up to 1 nor a whole number of tokens.
    """
    if value <= 1:
        return {"budget": value, "budget_tokens": None}
    if value != int(value):
        raise ValueError(f"budget {value} is neither a share up to 1 nor a whole number of tokens")
    return {"budget": DecodeFields.budget, "budget_tokens": int(value)}


def budget_value(config: DecodeFields) -> float | int:
    """Returns the budget of a configuration: a float is a share, an integer tokens."""
    return config.budget if config.budget_tokens is None else config.budget_tokens
