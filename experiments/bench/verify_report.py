"""The tables of `bench verify`, and what its measured parts predict."""

from collections.abc import Sequence

from retro_jax.experiments.io.tables import markdown


def predicted(acceptance: float, drafts: int, batch: int, draft_step_ms: float, check_ms: float) -> float:
    """Tokens per second of verified decoding.

    A round of m drafts and their check yields 1 + r + ... + r^m tokens for each sequence, where a draft is
    accepted with probability r if those before it were.

    Args:
      acceptance: r.
      drafts: m.
      batch: sequences.
      draft_step_ms: of the whole batch.
      check_ms: likewise, of m + 1 rows.
    """
    tokens = sum(acceptance**place for place in range(drafts + 1))
    return batch * tokens / (drafts * draft_step_ms + check_ms) * 1e3


def verify_report(values: dict) -> str:
    """Returns the results as Markdown.

    Args:
      values: as in results.json.
    """
    full, batch = values["full"], values["batch"]
    tokens = values["context"] + values["own_tokens"]
    cache, weights = batch * full["kv_bytes"] / 1e9, values["weight_bytes"] / 1e9
    told = [
        f"{values['model']} ({values['dtype']}), {batch} x {tokens} tokens on "
        f"{values['provenance']['device']}. Full attention takes {full['step_ms']:.2f} ms a step, "
        f"{full['tokens_per_s']:.0f} tokens/s, and reads {cache:.3g} GB of keys and "
        f"values and {weights:.3g} GB of weights."
    ]
    if values["rows"]:
        told += [
            measured_table(values["rows"], batch),
            "Share of the drafts at each position that were accepted:",
            acceptance_table(values["rows"]),
        ]
    told += [
        "Predicted by the times of a draft step and of a check: tokens/s, and in brackets times full "
        "attention's, where a draft is accepted with this probability if those before it were:",
        prediction_table(values["parts"], values["acceptances"], batch, full["tokens_per_s"]),
    ]
    return "\n\n".join(told)


def measured_table(rows: Sequence[dict], batch: int) -> str:
    """Returns what was measured, a row for each run."""
    header = [
        "drafts by", "budget", "drafts", "drafts a check", "tokens a check", "tokens/s", "times full's",
        "by bytes alone", "round (ms)", "in drafts", "in checks", "read in drafts (GB)", "in a check (GB)",
        "the same",
    ]  # fmt: skip
    body = [
        [
            row["name"],
            f"{row['budget']:g}",
            f"up to {row['drafts']}" if row["adapted"] else f"{row['drafts']}",
            f"{row['drafts_per_check']:.2f}",
            f"{row['tokens_per_check']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['over_full']:.2f}",
            f"{row['over_full_by_bytes']:.2f}",
            f"{row['round_ms']:.1f}",
            f"{row['draft_share']:.0%}",
            f"{1 - row['draft_share']:.0%}",
            f"{batch * row['draft_bytes_per_check'] / 1e9:.3g}",
            f"{batch * row['check_bytes_per_check'] / 1e9:.3g}",
            f"{row['same_sequences']} of {batch}",
        ]
        for row in rows
    ]
    return markdown(header, body)


def acceptance_table(rows: Sequence[dict]) -> str:
    """Returns the acceptance by position of the draft, a row for each run."""
    most = max(len(row["acceptance"]) for row in rows)
    body = [
        [
            f"{row['name']}, {row['budget']:g}, {'up to ' * row['adapted']}{row['drafts']}",
            *(f"{share:.2f}" for share in row["acceptance"]),
            *[""] * (most - len(row["acceptance"])),
        ]
        for row in rows
    ]
    return markdown(["", *map(str, range(1, most + 1))], body)


def prediction_table(
    parts: Sequence[dict], acceptances: Sequence[float], batch: int, full_tokens_per_s: float
) -> str:
    """Returns tokens per second by acceptance, a row for each number of drafts at each budget."""
    body = []
    for part in parts:
        rates = [
            predicted(share, part["drafts"], batch, part["draft_step_ms"], part["check_ms"])
            for share in acceptances
        ]
        body.append([
            part["name"],
            f"{part['budget']:g}",
            f"{part['drafts']}",
            f"{part['draft_step_ms']:.2f}",
            f"{part['check_ms']:.2f}",
            *(f"{rate:.0f} ({rate / full_tokens_per_s:.2f})" for rate in rates),
        ])  # fmt: skip
    header = ["drafts by", "budget", "drafts", "draft step (ms)", "check (ms)"]
    return markdown([*header, *(f"{share:g}" for share in acceptances)], body)
