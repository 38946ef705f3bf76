import numpy as np

from retro_jax.experiments.generate.tables import score_table


def test_score_table():
    nll = np.array([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    lines = score_table(nll, 10, ["a", "b"], 2).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["text", "NLL", "perplexity", "10-11", "12-13"]
    assert cells[2] == ["a", "2.0000", "7.389", "1.0000", "3.0000"]
    assert cells[4] == ["all", "2.0000", "7.389", "1.5000", "2.5000"]
