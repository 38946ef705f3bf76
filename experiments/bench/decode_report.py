"""Results of `bench decode` as tables and pictures."""

from collections.abc import Sequence

from retro_jax.experiments.io.tables import markdown
from retro_jax.experiments.pictures.files import pictures
from retro_jax.experiments.pictures.panels import Curves, Line, Scale, known_looks, looks
from retro_jax.experiments.pictures.words import counted, shortened


def speed_report(values: dict) -> str:
    """Returns the results of every context as Markdown."""
    parts, devices = [], values["data_devices"] * values["model_devices"]
    timed = values["rounds"] * values["steps_per_round"]
    for measured in values["contexts"]:
        chosen = [row["expert_bytes"] for row in measured["contestants"].values() if "expert_bytes" in row]
        parts.append(
            f"{measured['context']} tokens of {'noise as ' * (not values['prefill'])}context; the limit is "
            f"{values['weight_bytes'] / 1e9:.3g} GB of weights{', the chosen experts' * bool(chosen)} and "
            f"what is read of the cache, at {values['ceiling_gb_per_s']:.4g} GB/s"
            f"{f' on each of {devices} devices' * (devices > 1)}"
        )
        parts.append(speed_table(measured["contestants"], values["batch"], measured["groups"]))
        if len(measured["groups"]) > 1:
            told = "; then ".join(", ".join(group) for group in measured["groups"])
            parts.append(
                f"Measured in groups, one after another: {told}. Between groups (~) times are compared by "
                "their medians, not round by round."
            )
        if measured["reference"]:
            parts.append(
                f"{measured['reference']}: the tokens of full attention in the first "
                f"{measured['reference_agrees_for_steps']} of {values['warm_up_steps'] + timed} steps."
            )
    parts.append(
        f"Times are medians of {counted(timed, 'step')}, {counted(values['rounds'], 'turn')} of "
        f"{values['steps_per_round']}, after {values['warm_up_steps']} to warm up, which are not timed."
    )
    return "\n\n".join(parts)


def speed_table(contestants: dict[str, dict], batch: int, groups: Sequence[Sequence[str]]) -> str:
    """Returns the results of one context as a Markdown table, with each time over every other.

    Those of contestants that did not take turns with each other, being of different groups, begin with ~.
    """
    others = list(contestants)
    paired = {(name, other) for group in groups for name in group for other in group}
    header = ["", "ms/step", "10%-90%", "tokens/s", "KV MB/step"]
    experts = any("expert_bytes" in row for row in contestants.values())
    header += ["experts GB/step"] * experts + ["limit ms", "limit / time", "in a scan"]
    traced = any("launches" in row for row in contestants.values())
    header += ["busy ms", "launches"] * traced
    header += [f"time / {name}" for name in others]

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    body = [
        [
            name,
            f"{row['ms_per_step']:.2f}",
            "{:.2f}-{:.2f}".format(*row["ms_10_90"]),
            f"{batch * 1e3 / row['ms_per_step']:.1f}",
            "" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 1e6:.2f}",
            *([number(row["expert_bytes"] and row["expert_bytes"] / 1e9, 2)] if experts else []),
            number(row["limit_ms"], 2),
            "" if row["limit_ms"] is None else f"{row['limit_ms'] / row['ms_per_step']:.2f}",
            number(row["scan_ms"], 2),
            *([number(row.get("busy_ms"), 2), number(row.get("launches"), 0)] if traced else []),
            *("~" * ((name, other) not in paired) + f"{row['time_over'][other]:.2f}" for other in others),
        ]
        for name, row in contestants.items()
    ]
    return markdown(header, body)


def latency_pictures(values: dict, stem: str) -> dict[str, bytes]:
    """Draws time and traffic of a step against context.

    Args:
      values: as in the JSON file.
      stem: of the picture's name.

    Returns:
      PNG files by name.
    """
    measured = values["contexts"]
    contexts = [each["context"] for each in measured]
    times, traffic = [], []
    for name, look in looks(measured[0]["contestants"], known_looks(values["configs"])).items():
        rows = [each["contestants"][name] for each in measured]
        low, high = zip(*(row["ms_10_90"] for row in rows), strict=True)
        times.append(Line(name, look, contexts, [row["ms_per_step"] for row in rows], low, high))
        if rows[0]["kv_bytes"] is not None:
            traffic.append(Line(name, look, contexts, [row["kv_bytes"] / 1e6 for row in rows]))
    x = Scale("context (tokens)", log=True, at_values=True)
    step = f"ms per step of {counted(values['batch'], 'sequence')}"
    panels = [
        Curves(times, x, Scale(step, shown=(0.0,))),
        Curves(traffic, x, Scale("KV MB read by a step, for a sequence", shown=(0.0,))),
    ]
    turns = next(iter(measured[0]["milliseconds"].values()))
    steps = counted(len(turns) * len(turns[0]), "timed step")
    after = ", groups one after another" * any(len(each["groups"]) > 1 for each in measured)
    notes = [
        f"n = {steps} of each, in {counted(len(turns), 'turn')}{after}; medians",
        values["provenance"]["device"],
    ]
    title = f"{shortened(values['model'])} ({values['dtype']}): a decode step"
    return pictures(stem, panels, title, notes, interval="10th to 90th percentile of the steps")
