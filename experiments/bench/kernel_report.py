"""The table of a benchmark of kernels."""

from retro_jax.experiments.bench.device_time import EVENTS, MEAN, WALL
from retro_jax.experiments.io.tables import markdown, rounded

COLUMNS = {
    "operation": lambda row: row["operation"],
    "case": lambda row: row["case"],
    "window": lambda row: "" if row["window"] is None else str(row["window"]),
    "implementation": lambda row: row["implementation"],
    "us": lambda row: rounded(row["timing"]["busy_us"]),
    "span us": lambda row: rounded(row["timing"]["span_us"]),
    "events us": lambda row: rounded(row["events_us"]),
    "by": lambda row: row["timing"]["how"],
    "GB/s": lambda row: rounded(row["gb_per_s"]),
    "% of ceiling": lambda row: rounded(100 * row["share_of_ceiling"]),
    "ceiling us": lambda row: rounded(row["ceiling_us"]),
    "/ FlashInfer": lambda row: rounded(row["over_flashinfer"]),
}
"""What each column shows of a row; a column without any entry is left out."""

NOTES = {
    MEAN: "the calls did not all launch the same kernels, so this is the mean over all of them.",
    EVENTS: "the device trace lacks these kernels; the time is that of *events us*.",
    WALL: "there is no device trace, so this is the host's time, which includes the launch.",
}
"""What is said of ways to take a time, where they were used."""


def kernel_report(values: dict) -> str:
    """Returns the results as Markdown: the table, and what is needed to read it.

    Args:
      values: as in results.json.
    """
    cases = list(dict.fromkeys((row["operation"], row["case"]) for row in values["rows"]))

    def place(row: dict) -> tuple:
        return cases.index((row["operation"], row["case"])), row["baseline"] is not None, row["window"] or 0

    rows = sorted(values["rows"], key=place)
    columns = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    dims, ceilings = values["dimensions"], values["ceilings_gb_per_s"]
    cache = f" in {dims['cache_dtype']}" if dims.get("cache_dtype") else ""
    measured = ", ".join(f"{name} {rounded(rate)}" for name, rate in ceilings.items())
    parts = [
        f"# Operations on pages, {values['provenance']['device']}",
        f"{dims['dtype']}, {dims['kv_heads']} KV heads of {dims['group']} query heads, head_dim "
        f"{dims['head_dim']}, pages of {dims['page_size']}{cache}. Medians of {values['calls']} calls on "
        "inputs that take turns. *us* is the time in which at least one kernel of the call runs, *span us* "
        "from the first one's start to the last one's end. *GB/s* counts the bytes that cannot be avoided; "
        f"the *ceiling* is this device's read bandwidth, {rounded(values['ceiling_gb_per_s'])} GB/s "
        f"({measured}).",
        markdown(list(columns), list(zip(*columns.values(), strict=True))),
    ]
    ways = {row["timing"]["how"] for row in rows}
    parts += [f"*{way}*: {note}" for way, note in NOTES.items() if way in ways]
    if "events us" in columns:
        parts.append("*events us*: CUDA events around all calls, launched one after another without waiting.")
    if values["skipped"]:
        skipped = "\n".join(f"- {item['what']}: {item['why']}" for item in values["skipped"])
        parts.append(f"Skipped:\n\n{skipped}")
    return "\n\n".join(parts) + "\n"
