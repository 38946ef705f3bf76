import numpy as np
import pytest

from retro_jax.beginnings import LEAST, common_tokens, runs

EXAMPLES, OTHERS, RULES = np.arange(450), np.arange(1000, 1450), np.arange(2000, 2000 + LEAST)


def after(head, *ends):
    """Prompts that begin alike."""
    return [np.concatenate([head, np.full(size, token)]) for token, size in enumerate(ends)]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([EXAMPLES], [(1, 0)]),
        (after(EXAMPLES, 3, 1, 70), [(3, 450)]),
        ([EXAMPLES] * 4, [(4, 449)]),  # the last token is read by each
        ([EXAMPLES[:9], EXAMPLES], [(2, 0)]),
        ([EXAMPLES, EXAMPLES[:LEAST]], [(2, 0)]),
        ([EXAMPLES, EXAMPLES[: LEAST + 1]], [(2, LEAST)]),
        ([*after(EXAMPLES, 1, 2), *after(OTHERS, 2, 1), RULES, OTHERS], [(2, 450), (2, 450), (2, 0)]),
        ([RULES, *after(EXAMPLES, 1, 2), RULES[::-1]], [(1, 0), (2, 450), (1, 0)]),
        (after(np.r_[RULES, EXAMPLES], 1, 1) + after(np.r_[RULES, OTHERS], 1, 1), [(2, 514), (2, 514)]),
        ([*after(np.r_[RULES, EXAMPLES], 1), *after(np.r_[RULES, OTHERS], 1)], [(2, LEAST)]),
        (after(EXAMPLES[:100], 60) * 2 + after(EXAMPLES[:100], 50) * 2, [(4, 149)]),
    ],
)
def test_prompts_that_begin_alike_are_runs(prompts, expected):
    assert list(runs(prompts)) == expected


def test_common_tokens():
    assert common_tokens(EXAMPLES, OTHERS) == 0 and common_tokens(EXAMPLES[:3], EXAMPLES) == 3
    assert common_tokens(np.array([1, 2, 3]), np.array([1, 5, 3])) == 1
