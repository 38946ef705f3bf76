import pytest

from retro_jax.sizes import batch_rows, cache_capacity, program_length, rounded_up


@pytest.mark.parametrize("quantum", (1, 2, 4, 256))
@pytest.mark.parametrize("parts", (4, 8))
def test_sizes_are_few_and_near(quantum, parts):
    sizes = [rounded_up(count, quantum, parts) for count in range(1, 5000)]
    for count, size in enumerate(sizes, 1):
        assert count <= size < count + max(quantum, count / parts) and size % quantum == 0
        assert rounded_up(size, quantum, parts) == size
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= (parts + 2) * 13


def test_batches():
    assert [batch_rows(count) for count in (1, 2, 3, 4, 5, 8, 9, 17, 32)] == [1, 2, 4, 4, 6, 8, 10, 20, 32]
    assert [batch_rows(count, 3) for count in (1, 3, 7)] == [3, 6, 12]
    assert [batch_rows(count, 4) for count in (1, 4, 5)] == [4, 4, 8]


def test_capacities_stay_within_the_models_positions():
    assert [cache_capacity(tokens, 256) for tokens in (1, 170, 256)] == [256] * 3
    assert [cache_capacity(tokens, 4096) for tokens in (30, 257, 1025, 3900)] == [256, 512, 1280, 4096]
    assert cache_capacity(3900, 4000) == 4000 and cache_capacity(3900) == 4096
    assert [cache_capacity(tokens) for tokens in (10_300, 33_100)] == [11_264, 36_864]
    assert cache_capacity(300, 256) == 300  # which is refused where the cache is made


def test_lengths_of_programs():
    assert [program_length(count, 16, 256) for count in (1, 16, 17, 100, 300)] == [16, 16, 32, 128, 256]
    assert program_length(3, 16, 5) == program_length(300, 16, 5) == 5
