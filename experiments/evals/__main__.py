"""lm-eval's own command line, with this library's model beside its others: `--model retro_jax`."""

from retro_jax.experiments.evals.harness import check_installed


def main() -> None:
    """Registers the model, which is imported where it is chosen, and runs `lm-eval`."""
    check_installed()
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    model_registry.register("retro_jax", target="retro_jax.experiments.evals.language_model:RetroJaxLM")
    cli_evaluate()


if __name__ == "__main__":
    main()
