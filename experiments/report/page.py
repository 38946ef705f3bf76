"""The command `report`: one page of tables and plots from the folders of runs."""

from collections.abc import Mapping, Sequence

from retro_jax.experiments.io.estimates import LEAST_EXAMPLES, Interval, bootstrap
from retro_jax.experiments.io.files import write_bytes
from retro_jax.experiments.io.tables import markdown
from retro_jax.experiments.report.command import ReportFlags
from retro_jax.experiments.report.data import (
    Measured,
    difference,
    quest_of,
    read_runs,
    run_values,
)
from retro_jax.experiments.report.html_page import report_page
from retro_jax.experiments.report.leaderboard import leaderboard_values, leaderboards, sections
from retro_jax.experiments.report.paper import PAPER_NOTE, paper_rows
from retro_jax.experiments.report.pictures import (
    budget_plot,
    excess_plot,
    exposure_plot,
    latency_plot,
    position_plot,
    questions_groups,
    questions_plot,
)
from retro_jax.experiments.tasks import TASKS

PLOTS = {
    "position": (position_plot, "Score by position in the reply"),
    "excess": (excess_plot, "Excess NLL by position"),
    "budget": (budget_plot, "By budget"),
    "exposure": (exposure_plot, "Exposure"),
    "latency": (latency_plot, "Time of a step"),
}


class Report(ReportFlags):
    """The command, with its work."""

    def run(self) -> None:
        """Reads the folders and writes the page."""
        if self.out.suffix != ".md":
            raise ValueError(f"--out {self.out} is no Markdown page; name it *.md")
        if not self.folders:
            raise ValueError("name at least one folder of a run")
        html = self.out.with_suffix(".html")
        for file in (self.out, html):
            if file.exists() and not self.overwrite:
                raise ValueError(f"{file} exists; choose another --out, or pass --overwrite")
        runs = read_runs(self.folders)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        page, pictures = make_page(runs, self.out.stem)
        for name, contents in pictures.items():
            write_bytes(self.out.parent / name, contents)
        write_bytes(html, report_page(runs))
        write_bytes(self.out, page.encode())
        values = {"page": str(self.out), "runs": [run_values(run) for run in runs], "paper": paper_rows(runs)}
        values["leaderboards"] = leaderboard_values(leaderboards(runs))
        self.show(values, page)


def make_page(runs: Sequence[Measured], stem: str) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by file name."""
    parts = [
        "# Results",
        f"In brackets: 95% bootstrap intervals over examples, where there are {LEAST_EXAMPLES} or more. "
        "Differences are taken on the same examples. "
        "*Exposure*: pages that a query has attended to in the end over those of its own step. *KV MB/step*: "
        "keys, values and page statistics that a step reads for a sequence. *Tokens/s*: generated where a "
        "reply that ended made room for the next, whose prompt was read meanwhile.",
    ]
    parts += sections(leaderboards(runs))
    pictures = {}
    if groups := questions_groups(runs):
        parts.append("## By number of questions")
        parts += _shown("Score by number of questions", questions_plot(runs, f"{stem}-questions"), pictures)
        parts += [_questions_table(group) for group in groups]
    if beside := paper_rows(runs):
        parts += ["## Beside the paper", PAPER_NOTE, _paper_table(beside)]
    for number, run in enumerate(runs, 1):
        parts += [f"## {run.title}", _about(run), *_missing(run), _table(run)]
        for name, (plot, title) in PLOTS.items():
            parts += _shown(title, plot(run, f"{stem}-{number}-{name}"), pictures)
    return "\n\n".join(parts) + "\n", pictures


def _shown(title: str, found: Mapping[str, bytes], pictures: dict[str, bytes]) -> list[str]:
    """Adds pictures to those of the page; returns the lines that show them."""
    pictures |= found
    return [f"![{title}]({file})" for file in found]


def _missing(run: Measured) -> list[str]:
    """What an unfinished run lacks, in words; nothing for a finished one."""
    if not run.missing:
        return []
    told = ", ".join(f"{label} has {have} of {planned}" for label, (have, planned) in run.missing.items())
    return [f"**Unfinished.** Replies: {told}. The command that made the run continues it."]


def _about(run: Measured) -> str:
    config = run.config
    task = ", ".join(f"{key} {value}" for key, value in config["task"].items() if key != "name")
    made = [
        f"commit {start['commit']}, {start['device']}, jax {start['versions']['jax']}" for start in run.starts
    ]
    return (
        f"{config['model']}, task {config['task']['name']} ({task}); {len(run.lines)} results of "
        f"{len({line['example'] for line in run.lines})} examples. "
        + "; ".join([f"Seed {config['sampling']['seed']}", *dict.fromkeys(made)])
        + "."
    )


def _table(run: Measured) -> str:
    metric = TASKS[run.config["task"]["name"]].metric
    header = ["method", "examples", metric, "- full", "- Quest, same budget", "exposure", "KV MB/step"]
    rates = {method: run.tokens_per_second(method) for method in run.methods}
    timed = any(rates.values())
    header += ["tokens/s"] * timed
    body = []
    for method in run.methods:
        values, quest = run.by_example(method), quest_of(run, method)
        full = difference(run, method, "full") if method != "full" else None
        less = difference(run, method, quest) if quest else None
        exposure = run.exposure(method)
        body.append(
            [
                method,
                str(len(values)),
                bootstrap(list(values.values())).text() if values else "not scored",
                full.text() if full else "",
                less.text() if less else "",
                f"{exposure[-1]:.2f}" if exposure else "",
                f"{run.mean(method, 'kv_bytes') / 1e6:.2f}",
                *([f"{rates[method]:.1f}" if rates[method] else ""] if timed else []),
            ]
        )
    return markdown(header, body)


def _questions_table(group: Sequence[Measured]) -> str:
    header = [group[0].config["task"]["source"], *(f"n = {run.config['task']['n']}" for run in group)]
    body = []
    for method in group[0].methods:
        cells = [list(run.by_example(method).values()) for run in group]
        body.append([method, *(bootstrap(values).text() if values else "" for values in cells)])
    return markdown(header, body)


def _paper_table(rows: Sequence[dict]) -> str:
    header = ["model", "task", "method", "quantity", "ours", "paper"]
    body = []
    for row in rows:
        ours, digits = Interval(**row["ours"]), 2 if row["quantity"].startswith("exposure") else 1
        names = [row[name] for name in header[:4]]
        body.append([*names, ours.text(digits), f"{row['paper']:.{digits}f}"])
    return markdown(header, body)
