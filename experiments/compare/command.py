"""The command `compare`: methods side by side over the same texts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from retro_jax.experiments.compare.sweep import Sweep
from retro_jax.experiments.io.flags import Flag, NoPrefix, OverDevices, TextCommand, common_flags
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.settings import VARIED

CommonFlags = common_flags(*VARIED)


@dataclass(kw_only=True)
class Compare(OverDevices, TextCommand):
    """Run full attention, Quest, RetroAttention and others over the same text, and show what each loses.

    Writes a table, JSON, pictures, a page for a browser, and each run's value for every token. Each run is
    saved when it is finished: the same command continues where it was stopped, and further values and methods
    add rows.
    """

    sweep: Annotated[Sweep, NoPrefix] = field(default_factory=Sweep)
    budgets_together: Flag[bool] = False
    """Decode the texts of all budgets as one batch: faster on an accelerator, and as many times the cache."""
    out: Path | None = None
    """Folder for the results; None: one under runs/ that is named after the model and the settings."""
    config: Annotated[CommonFlags, NoPrefix] = field(default_factory=CommonFlags)

    def run(self) -> None:
        """Runs what the folder does not have yet, then writes and prints the comparison."""
        from retro_jax.experiments.compare.comparison import compare, identity, summary
        from retro_jax.experiments.compare.folder import ComparisonFolder
        from retro_jax.experiments.compare.html_page import comparison_page
        from retro_jax.experiments.compare.pictures import PAGE, comparison_pictures
        from retro_jax.experiments.compare.tables import comparison_report
        from retro_jax.experiments.io.folders import digest, write_results
        from retro_jax.experiments.io.identity import known_identity

        configs = self.sweep.configurations(self.config.config(method="full", sink_pages=0))
        together = len(set(self.sweep.budgets)) if self.budgets_together else 1
        if self.out is not None:
            ComparisonFolder.check(self.out, known_identity(self, configs[0], VARIED), partial=True)
        model, texts = self.read(configs, copies=together)
        what = identity(self.model, model, texts, configs[0])
        name = f"compare-{Path(self.model).name.replace(':', '-')}"
        folder = ComparisonFolder(self.out or Path("runs") / f"{name}-{digest(what)[:8]}", what)
        runs = compare(model, texts, configs, folder, Progress, budgets_together=self.budgets_together)
        if not runs:
            return  # another process has them
        report = comparison_report(what, runs, self.bin_tokens)
        values = summary(what, runs, self.bin_tokens)
        shown = {PAGE: comparison_page(values, runs)} | comparison_pictures(what, runs)
        write_results(folder.path, values, report, shown)
        files = "\n".join(str(folder.path / name) for name in shown)
        self.show(values, f"{report}\nTable, JSON, page, pictures and raw values: {folder.path}\n{files}")
