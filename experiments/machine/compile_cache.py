"""JAX's persistent compilation cache, on by default for commands that load a model."""

import os
import sys
import tempfile

import jax
from jax.experimental.compilation_cache import compilation_cache

from retro_jax.models.formats.wheel import cache_folder

MAX_BYTES = 4 * 2**30
"""Of the folder; the programs that were not used for longest go first."""


def keep_programs() -> None:
    """Keeps compiled programs in `compiled` beside the fetched models, for later processes.

    JAX's own settings come first: JAX_COMPILATION_CACHE_DIR, and JAX_ENABLE_COMPILATION_CACHE=0. A folder
    that cannot be written is said in one line, and nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    try:
        folder = cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        print(f"retro-jax: compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # JAX looks at the setting once, until this
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
