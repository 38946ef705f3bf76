"""What the tests of kernels share."""

import numpy as np
import pytest
from jax._src import callback as jax_callbacks
from jax._src.pallas.mosaic_gpu.interpret import shared_memory


@pytest.fixture(autouse=True)
def callbacks_of_numpy(monkeypatch):
    """Interpreters of kernels get NumPy arrays.

    They call back for each read and write of a kernel's memory, and JAX puts every argument on a device
    before, from which they take it back at once: more than half of the time of their tests.
    """
    to_int = shared_memory._to_int

    def call(*args, callback, **_):
        return [np.asarray(result) for result in callback(*map(np.array, args))]

    monkeypatch.setattr(jax_callbacks, "io_callback_impl", call)
    monkeypatch.setattr(
        shared_memory, "_to_int", lambda x: x.item() if isinstance(x, np.ndarray) else to_int(x)
    )
