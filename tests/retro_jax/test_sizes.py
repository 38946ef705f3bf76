import pytest

import retro_jax as rj
from retro_jax.sizes import batch_rows, cache_capacity, program_length, rounded_up
from tests.retro_jax.tiny import tiny


@pytest.mark.parametrize("quantum", (1, 2, 4, 256))
def test_sizes_are_few_and_near(quantum):
    sizes = [rounded_up(count, quantum) for count in range(1, 5000)]
    for count, size in enumerate(sizes, 1):
        assert count <= size < count + max(quantum, count / 4) and size % quantum == 0
        assert rounded_up(size, quantum) == size
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 6 * 13


def test_batches():
    assert [batch_rows(count) for count in (1, 2, 3, 4, 5, 8, 9, 17, 32)] == [1, 2, 4, 4, 6, 8, 10, 20, 32]


def test_capacities_stay_within_the_models_positions():
    model = tiny(3).config  # of 256 positions
    assert [cache_capacity(model, tokens) for tokens in (1, 170, 256)] == [256] * 3
    longer = rj.load_model("random:tiny").config  # of 4096
    assert [cache_capacity(longer, tokens) for tokens in (30, 257, 1025, 3900)] == [256, 512, 1280, 4096]


def test_lengths_of_programs():
    assert [program_length(count, 16, 256) for count in (1, 16, 17, 100, 300)] == [16, 16, 32, 128, 256]
    assert program_length(3, 16, 5) == program_length(300, 16, 5) == 5
