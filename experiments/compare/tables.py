"""Comparisons as Markdown tables."""

from collections.abc import Sequence

from retro_jax.experiments.compare.comparison import Row, rows
from retro_jax.experiments.compare.folder import Run
from retro_jax.experiments.compare.ladder import LADDER, beside_ladder, ladder
from retro_jax.experiments.io.budgets import budget_fields, budget_value
from retro_jax.experiments.io.estimates import BLOCK, UNTOLD, estimate, position_bins, ratio
from retro_jax.experiments.io.settings import columns, constants, label, run_name
from retro_jax.experiments.io.tables import markdown, number


def comparison_table(comparison: Sequence[Row], bins: Sequence[tuple[int, int]]) -> str:
    """Returns the table of one comparison: a row per run, full attention's log-likelihood first."""
    varying = columns([row.run.config for row in comparison])
    header = [
        "method", "w", *(axis.column for axis in varying), "NLL", "excess NLL",
        *(f"{start}-{end - 1}" for start, end in bins), "of Quest's", "exposure", "KV MB/step",
    ]  # fmt: skip
    body = []
    for row in comparison:
        config = row.run.config
        full, base = config.method == "full", row.run.name == "full"
        body.append([
            label(config),
            "" if full else str(config.slots),
            *("" if full else str(axis.value(config)) for axis in varying),
            f"{row.nll.mean:.4f}",
            "" if base else number(row.excess),
            *("" if base else number(part) for part in row.by_position),
            "" if row.ratio is None else number(row.ratio, 3),
            "" if full else f"{row.run.exposure[-1]:.2f}",
            f"{row.run.kv_bytes / 1e6:.2f}",
        ])  # fmt: skip
    return markdown(header, body)


def ladder_table(runs: Sequence[Run], budget: float) -> str:
    """Returns what each part of `LADDER` adds at one budget, beside the paper's and all other methods.

    Args:
      runs: of a comparison, all texts together; steps whose run is not among them are left out.
      budget: up to 1 a share of the context, above it tokens.
    """
    by_name = {run.name: run for run in runs}
    full = by_name["full"]
    fields = budget_fields(budget)
    steps, paper = ladder(full.config, fields), beside_ladder(full.config, fields)
    words = {run_name(config): f"+ {words}" for config, (words, _) in zip(steps, LADDER, strict=True)}
    first = run_name(steps[0])
    listed = {first: "Quest, no sink page"} | {run_name(config): name for name, config in paper.items()}
    listed |= {name: text for name, text in words.items() if name != first}
    for run in runs:
        if run.config.method != "full" and budget_value(run.config) == budget:
            text = label(run.config) + (f", w = {run.config.slots}" if run.config.slots > 1 else "")
            listed.setdefault(run.name, f"{text}, {run.config.sink_pages} sink pages")
    quest, sink = (by_name.get(run_name(config)) for config in steps[:2])
    body, before = [], None
    for name, text in listed.items():
        if (run := by_name.get(name)) is None:
            continue
        excess = run.nll - full.nll
        body.append([
            text,
            number(estimate(excess)),
            number(estimate(run.nll - before.nll)) if name in words and before else "",
            *(number(ratio(excess, base.nll - full.nll), 3) if base else "" for base in (quest, sink)),
            f"{run.pages_loaded * run.config.page_size:.0f}",
            f"{run.kv_bytes / 1e6:.2f}",
        ])  # fmt: skip
        before = run if name in words else before
    header = [
        "method", "excess NLL", "less that of the row it adds to", "of Quest's",
        "of Quest's with a sink page", "tokens loaded", "KV MB/step",
    ]  # fmt: skip
    return markdown(header, body)


def comparison_report(identity: dict, runs: Sequence[Run], bin_tokens: int) -> str:
    """Returns the whole report of a comparison as Markdown: all texts together, then each text."""
    prompt, tokens, names = identity["prompt_tokens"], identity["tokens"], identity["texts"]
    bins = position_bins(prompt, tokens, bin_tokens)
    settings = constants([run.config for run in runs]) | identity["config"]
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    parts = [
        f"# {identity['model']} ({identity['dtype']}), {', '.join(names)}",
        f"{tokens} tokens of each text: a prompt of {prompt}, then teacher-forced decoding. "
        f"Settings: {told}.",
        "Excess is negative log-likelihood (nats per token) over full attention on the same tokens, for the "
        "whole text and for ranges of positions; ± is one standard error, from the means of blocks of "
        f"{BLOCK} tokens. *Of Quest's* divides the excess by that of Quest with the same settings. "
        f"{UNTOLD}. "
        "*Exposure* is the pages that a query has attended to in the end over those of its own step. "
        "*KV MB/step* is what one step loads of keys, values and page statistics for one text.",
        comparison_table(rows(runs, bins, prompt), bins),
    ]
    names_there = {run.name for run in runs}
    for budget in sorted({budget_value(run.config) for run in runs}, key=lambda b: (isinstance(b, float), b)):
        top = ladder(runs[0].config, budget_fields(budget))[-1]
        if run_name(top) in names_there:
            parts += [f"## From Quest to preset mean-key, budget {budget:g}", ladder_table(runs, budget)]
    for row in rows(runs, bins, prompt):
        if not row.run.config.overwrite and row.quest_difference is not None:
            parts.append(
                f"In {row.run.name} no token's value differs from Quest's by more than "
                f"{row.quest_difference:.1e}."
            )
    if len(names) > 1:
        for text, name in enumerate(names):
            parts += [f"## {name}", comparison_table(rows(runs, bins, prompt, text), bins)]
    return "\n\n".join(parts) + "\n"
