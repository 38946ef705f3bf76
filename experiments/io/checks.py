"""What is checked of flags before anything begins."""


def check_least(least: int = 1, **flags: int | tuple[int, ...]) -> None:
    """Raises ValueError if a flag's number, or one of its numbers, is below `least`, or a flag has none."""
    for name, given in flags.items():
        flag, numbers = f"--{name.replace('_', '-')}", given if isinstance(given, tuple) else (given,)
        if not numbers:
            raise ValueError(f"{flag} has no value; give at least one")
        if min(numbers) < least:
            raise ValueError(f"{flag} is {min(numbers)}; it must be {least} or more")
