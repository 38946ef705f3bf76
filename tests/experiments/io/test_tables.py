from retro_jax.experiments.io.estimates import Estimate
from retro_jax.experiments.io.tables import markdown, number


def test_markdown():
    assert markdown(["a", "number"], [["x", "1"], ["longer", "22"]]) == (
        "| a      | number |\n| ------ | -----: |\n| x      |      1 |\n| longer |     22 |"
    )


def test_number():
    assert number(Estimate(0.12345, 0.0012)) == "0.1235 ± 0.0012"
    assert number(Estimate(1.0, 0.0), 3) == "1.000"
    assert number(Estimate(1.0, float("nan")), 1) == "1.0"
    assert number(Estimate(float("nan"), float("nan"))) == "-"
