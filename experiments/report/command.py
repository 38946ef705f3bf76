"""The flags of `report`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from retro_jax.experiments.io.flags import Flag, Output


@dataclass(kw_only=True)
class ReportFlags(Output):
    """Make one page with tables and plots, as Markdown and for a browser, from the folders of runs.

    Folders of one run that was made in parts, on several machines or with other methods, are joined.
    Unfinished runs are shown as far as they are, with what is missing. Intervals are 95% bootstrap intervals
    over examples; differences are taken on the same examples.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path
    """The page, a .md file; its pictures and the page for a browser (.html) go beside it, named after it."""
    overwrite: Flag[bool] = False
    """Replace the pages and their pictures if they are there."""
