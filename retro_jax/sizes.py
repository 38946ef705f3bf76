"""Sizes of compiled programs: few, so that inputs of similar sizes share one program.

Results do not depend on them: what a program has room for beyond its input is masked, and what a cache holds
beyond a sequence's length has no meaning. All rules are here.
"""

import jax

from pallas_kernels.dispatch import SEQUENCES

CAPACITY_QUANTUM = 256
"""Tokens; short prompts with 20 or with 150 new tokens share one program."""
MIN_CHUNK, MIN_STEPS = 16, 8
"""The smallest programs of a prompt's tokens and of forced steps: below, another compilation costs more."""


def rounded_up(count: int, quantum: int, parts: int = 4) -> int:
    """The next multiple of `quantum`, or of a part of the power of two below `count` if that is larger.

    So there are about `parts` (a power of two) sizes for each power of two, and a size exceeds its count by
    less than that part of it or by less than `quantum`.
    """
    step = max(quantum, (1 << (count.bit_length() - 1)) // parts // quantum * quantum)
    return -(-count // step) * step


def cache_capacity(tokens: int, positions: int | None = None) -> int:
    """Tokens per sequence that a cache holds which needs `tokens`: up to an eighth more where they are many.

    Args:
      tokens: that it needs.
      positions: of the model, beyond which it has no room; None: not known.
    """
    # Long caches are most of the memory, so that they have smaller steps than batches.
    size = rounded_up(tokens, CAPACITY_QUANTUM, parts=8)
    return size if positions is None else max(tokens, min(size, positions))


def batch_rows(sequences: int, devices: int | None = None) -> int:
    """Rows of a batch of so many sequences: 1, 2, 4, 6, 8, 10, ..., and a multiple of `devices`.

    The rows after the sequences hold none: they are never active.

    Args:
      sequences: of the batch.
      devices: of the mesh's data axis; None: of the current mesh.
    """
    if devices is None:
        mesh = jax.sharding.get_mesh()
        devices = 1 if mesh.empty else mesh.shape.get(SEQUENCES, 1)
    return rounded_up(sequences, devices if sequences == 1 else 2 * devices if devices % 2 else devices)


def newcomer_rows(slots: int, devices: int | None = None) -> int:
    """Rows of the state that prompts are read into while `slots` sequences are decoded.

    One for each 8 slots, so that what they need adds an eighth to the cache. See `batch_rows` for devices.
    """
    return batch_rows(max(slots // 8, 1), devices)


def held_rows(slots: int, devices: int | None = None) -> int:
    """Rows of all states that `generate_many` holds: of the slots, of newcomers, of what these begin with.

    See `batch_rows` for devices.
    """
    return batch_rows(slots, devices) + newcomer_rows(slots, devices) + batch_rows(1, devices)


def program_length(count: int, smallest: int, largest: int) -> int:
    """The power of two that holds `count`, at least `smallest`; `largest` if it is less."""
    return min(max(1 << (count - 1).bit_length(), smallest), largest)
