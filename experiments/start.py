"""Where the command `retro-jax` starts, so that Ctrl-C is one line while the command line is imported."""

from retro_jax.experiments.io.interrupt import stop_in_words


def main() -> None:
    """Runs one command, see `retro_jax.experiments.cli.main`."""
    stop_in_words()
    from retro_jax.experiments import cli

    cli.main()


if __name__ == "__main__":
    main()
