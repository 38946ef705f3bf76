"""The pictures of a comparison: excess against position and each setting that varies, and exposure."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from retro_jax.experiments.compare.folder import Run
from retro_jax.experiments.compare.ladder import LADDER, beside_ladder, ladder
from retro_jax.experiments.compare.sweep import NAMES
from retro_jax.experiments.io.budgets import budget_fields, budget_value
from retro_jax.experiments.io.estimates import BLOCK, estimate, running_mean
from retro_jax.experiments.io.settings import Axis, columns, constants, label, order, preset_of, run_name
from retro_jax.experiments.pictures.files import Layout, pictures
from retro_jax.experiments.pictures.panels import QUEST, Curves, Line, Look, Scale, looks
from retro_jax.experiments.pictures.words import counted, listed, shortened

SPAN = 8
"""Blocks in the running mean; texts of fewer blocks have so many points, and no errors."""
MOST_PANELS, MOST_LINES = 6, 12
"""Of a picture, at most: more cannot be read. What is left out is said, and on the page of the comparison."""
PAGE = "comparison.html"
"""The file of the page, beside the pictures."""
EXCESS = Scale("excess NLL (nats per token)", shown=(0.0,))
LATER_STEPS = Scale("later decode steps (a window of w has w - 1)", whole=True)
EXPOSURE = Scale("exposure (pages attended to / loaded)")
SWEPT = {
    "budget": (
        "tokens loaded by a step, per layer and KV head",
        lambda run: run.pages_loaded * run.config.page_size,
    ),
    "page size": ("tokens of a page", lambda run: run.config.page_size),
    "window": ("window w (1 is Quest)", lambda run: run.config.slots),
}
"""The settings that excess is drawn against: what the horizontal axis shows, and its value for a run."""
ERROR = f"one standard error to each side, from blocks of {BLOCK} tokens"


def comparison_pictures(identity: dict, runs: Sequence[Run]) -> dict[str, bytes]:
    """Draws a comparison.

    Args:
      identity: what the runs share, as `retro_jax.experiments.compare.comparison.identity` gives it.
      runs: full attention and at least one other.

    Returns:
      PNG files by name: comparison.png (excess against position), excess-SETTING.png for settings that vary,
      exposure.png, and ladder.png where the ladder was run. What has nothing to show is left out; of what
      cannot be read in one picture the rest is told.
    """
    found = position_pictures(identity, runs) | exposure_pictures(identity, runs)
    for setting in SWEPT:
        found |= sweep_pictures(identity, runs, setting)
    return found | ladder_pictures(identity, runs)


def position_pictures(identity: dict, runs: Sequence[Run]) -> dict[str, bytes]:
    """Draws excess negative log-likelihood against position, as running means over blocks of tokens.

    Budgets, page sizes and other settings that differ have a panel for each combination.
    """
    full, others = _split(runs)
    first = identity["prompt_tokens"]
    names = _names(others, _name)
    panels, rest = _readable(others, names)
    line_looks = _looks(names[run.name] for chosen in panels.values() for run in chosen)

    def line(run: Run) -> Line:
        name, (centres, mean, error) = names[run.name], running_excess(run, full)
        return Line(name, line_looks[name], first + centres, mean, mean - error, mean + error)

    across = Scale(f"position (tokens), mean of {counted(smoothed(full), 'token')} around it", whole=True)
    drawn = [Curves(list(map(line, chosen)), across, EXCESS, title) for title, chosen in panels.items()]
    title = f"{_model(identity)}: excess NLL over full attention against position"
    return pictures("comparison", drawn, title, [*_notes(identity, runs), rest], Layout(share_y=True), ERROR)


def running_excess(run: Run, full: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns centres (tokens from the prompt's end), means over blocks around them, and standard errors.

    Texts of fewer than `SPAN` blocks are cut into `SPAN` parts, as far as there are tokens, without errors.
    """
    block, span = _smoothing(full)
    return running_mean(run.nll - full.nll, span, block)


def smoothed(run: Run) -> int:
    """Returns the tokens in a mean of `running_excess`."""
    return math.prod(_smoothing(run))


def _smoothing(run: Run) -> tuple[int, int]:
    """Tokens of a block, and blocks of a mean."""
    tokens = run.nll.shape[1]
    block = min(BLOCK, max(1, tokens // SPAN))
    return block, max(1, min(SPAN, tokens // block // 4)) if block == BLOCK else 1


def exposure_pictures(identity: dict, runs: Sequence[Run]) -> dict[str, bytes]:
    """Draws exposure: a line for all windows that differ in nothing else, from the widest of them."""
    _, others = _split(runs)
    wide = [run for run in others if run.config.attention.scored and run.config.slots > 1]
    names = _names(wide, any_window)
    panels, rest = _readable(wide, names)
    line_looks = looks(names[run.name] for chosen in panels.values() for run in chosen)

    def line(name: str, chosen: Sequence[Run]) -> Line:
        widest = max((run for run in chosen if names[run.name] == name), key=lambda run: run.config.slots)
        told = f"{name}, w = {widest.config.slots}"
        return Line(told, line_looks[name], range(len(widest.exposure)), widest.exposure)

    drawn = [
        Curves(
            [line(name, chosen) for name in dict.fromkeys(names[run.name] for run in chosen)],
            LATER_STEPS,
            EXPOSURE,
            title,
        )
        for title, chosen in panels.items()
    ]
    title = f"{_model(identity)}: what a query has attended to in the end"
    return pictures("exposure", drawn, title, [*_notes(identity, runs), rest], Layout(share_y=True))


def sweep_pictures(identity: dict, runs: Sequence[Run], setting: str) -> dict[str, bytes]:
    """Draws excess negative log-likelihood, means over all scored tokens, against a setting of `SWEPT`.

    Nothing is drawn where the setting does not vary (fewer than three windows say nothing of the window).
    """
    full, others = _split(runs)
    varying = columns([run.config for run in others])
    if setting == "window":
        others = [run for run in others if run.config.attention.scored]
        varies = len({run.config.slots for run in others}) > 2
    else:
        varies = setting in [axis.column for axis in varying]
    if not varies:
        return {}
    words, value = SWEPT[setting]
    names = _names(others, any_window if setting == "window" else _name)
    panels, rest = _readable(others, names, setting)
    line_looks = _looks(names[run.name] for chosen in panels.values() for run in chosen)

    def lines(chosen: Sequence[Run]) -> list[Line]:
        found = []
        for known in dict.fromkeys(names[run.name] for run in chosen):
            points = sorted((run for run in chosen if names[run.name] == known), key=value)
            excess = [estimate(run.nll - full.nll) for run in points]
            mean = np.array([point.mean for point in excess])
            error = np.array([point.error for point in excess])
            x = [value(run) for run in points]
            found.append(Line(known, line_looks[known], x, mean, mean - error, mean + error))
        return found

    drawn = [
        Curves(lines(chosen), Scale(words, log=True, at_values=True), EXCESS, title)
        for title, chosen in panels.items()
    ]
    stem = f"excess-{setting.replace(' ', '-')}"
    title = f"{_model(identity)}: excess NLL over full attention against {setting}"
    return pictures(stem, drawn, title, [*_notes(identity, runs), rest], Layout(share_y=True), ERROR)


def ladder_pictures(identity: dict, runs: Sequence[Run]) -> dict[str, bytes]:
    """Draws excess against what a step reads: the steps of the ladder, the paper's method, further methods.

    Each line is one method at several budgets; both axes are logarithmic, unless an excess is not above zero.
    What reads more than half of what full attention does, and random selection, are left out. Nothing is
    drawn where the ladder was not run.
    """
    full, others = _split(runs)
    by_name = {run.name: run for run in others}
    lines: dict[str, list[Run]] = {}
    for budget in map(budget_fields, sorted({budget_value(run.config) for run in others})):
        steps = ladder(full.config, budget)
        parts = {f"+ {words}": config for (words, _), config in zip(LADDER[1:], steps[1:], strict=True)}
        named = {NAMES["quest"]: steps[0]} | parts
        for words, config in (named | beside_ladder(full.config, budget)).items():
            if run := by_name.pop(run_name(config), None):
                lines.setdefault(words, []).append(run)
    if f"+ {LADDER[-1][0]}" not in lines:
        return {}
    for run in by_name.values():
        if run.kv_bytes < full.kv_bytes / 2 and run.config.score != "random":
            lines.setdefault(_name(run), []).append(run)
    line_looks = _looks(lines)
    drawn = []
    for words, line in lines.items():
        line = sorted(line, key=lambda run: run.kv_bytes)
        excess = [estimate(run.nll - full.nll).mean for run in line]
        drawn.append(Line(words, line_looks[words], [run.kv_bytes / 1e6 for run in line], excess))
    panel = Curves(
        drawn,
        Scale("MB of keys, values and page statistics that a step reads for a text", log=True),
        Scale(EXCESS.label, log=True),
    )
    title = f"{_model(identity)}: excess NLL over full attention, from Quest to preset mean-key"
    notes = [*_notes(identity, runs), "+ adds a part to the line above"]
    return pictures("ladder", [panel], title, notes, Layout(panel=(6.0, 4.6)))


def _split(runs: Sequence[Run]) -> tuple[Run, list[Run]]:
    """Full attention, and the others; without overwriting there is nothing to see but Quest."""
    full = next(run for run in runs if run.config.method == "full")
    return full, [run for run in runs if run.config.method != "full" and run.config.overwrite]


def _readable(
    runs: Sequence[Run], names: Mapping[str, str], without: str = ""
) -> tuple[dict[str, list[Run]], str]:
    """Panels of so many runs as can be read, and in words what is left out; "" if nothing is.

    Settings that differ have panels, but not those of a preset alone, which is a line in others' panels.
    Of too many panels, settings are held at one value each, the last first: at the default if it is there.
    Of too many values of the first setting, some from the lowest to the highest are kept.

    Args:
      runs: all that there are.
      names: of the lines that runs are in.
      without: a setting that has no panels.
    """
    presets = _lone_presets(runs)
    plain = [run for run in runs if run.name not in presets]
    apart = [axis for axis in columns([run.config for run in plain]) if axis.column != without]
    shown, told = list(runs), []
    while len(panels := _panels(shown, apart, presets)) > MOST_PANELS:
        axis = apart[-1]
        values = list(dict.fromkeys(axis.value(run.config) for run in sorted(plain, key=_order)))
        if len(apart) > 1:
            kept = [axis.default if axis.default in values else values[0]]
            apart.pop()
        else:
            kept = [values[round(place)] for place in np.linspace(0, len(values) - 1, MOST_PANELS)]
        left_out = set(values) - set(kept)
        shown = [run for run in shown if axis.value(run.config) not in left_out]
        told.append(f"{axis.column} {', '.join(map(str, kept))}")
    lines = list(dict.fromkeys(names[run.name] for chosen in panels.values() for run in chosen))
    if len(lines) > MOST_LINES:
        told.append(f"{MOST_LINES} of {len(lines)} lines")
        kept = set(lines[:MOST_LINES])
        panels = {
            title: [run for run in chosen if names[run.name] in kept] for title, chosen in panels.items()
        }
    if not told:
        return panels, ""
    count = len({run.name for chosen in panels.values() for run in chosen})
    return panels, f"Shown are {count} of {len(runs)} runs ({'; '.join(told)}); {PAGE} has all"


def _order(run: Run) -> tuple:
    return order(run.config)


def _panels(runs: Sequence[Run], apart: Sequence[Axis], presets: Mapping[str, str]) -> dict[str, list[Run]]:
    """Runs by the settings that have panels of their own, in words.

    Presets are in all panels whose settings they have, or no other run does.
    """
    panels: dict[str, list[Run]] = {}
    plain = [run for run in sorted(runs, key=_order) if run.name not in presets]
    for run in plain:
        panels.setdefault(_settings(run, apart), []).append(run)
    firsts = {title: chosen[0] for title, chosen in panels.items()}
    for run in sorted(runs, key=_order):
        if run.name in presets:
            own = [
                axis
                for axis in apart
                if any(axis.value(other.config) == axis.value(run.config) for other in plain)
            ]
            for title, first in firsts.items():
                if _settings(first, own) == _settings(run, own):
                    panels[title].append(run)
    return panels


def _lone_presets(runs: Sequence[Run]) -> dict[str, str]:
    """Runs of presets that no other run shares the settings of, by their names; none if there are no others.

    Settings are those that have panels, but for the budget, which presets do not set.
    """
    axes = [axis for axis in columns([run.config for run in runs]) if axis.column != "budget"]
    alike: dict[str, set[str | None]] = {}
    for run in runs:
        alike.setdefault(_settings(run, axes), set()).add(preset_of(run.config))
    found = {}
    for run in runs:
        kinds = alike[_settings(run, axes)]
        if len(kinds) == 1 and None not in kinds:
            found[run.name] = preset_of(run.config)
    return found if len(found) < len(runs) else {}


def _names(runs: Sequence[Run], name: Callable[[Run, str | None], str]) -> dict[str, str]:
    """The names of lines, by those of runs."""
    presets = _lone_presets(runs)
    return {run.name: name(run, presets.get(run.name)) for run in runs}


def _settings(run: Run, axes: Sequence[Axis]) -> str:
    return ", ".join(f"{axis.column} {axis.value(run.config)}" for axis in axes)


def _model(identity: dict) -> str:
    return f"{shortened(identity['model'])} ({identity['dtype']})"


def _notes(identity: dict, runs: Sequence[Run]) -> list[str]:
    """On how much was measured, and the settings that all runs share."""
    texts, prompt = identity["texts"], identity["prompt_tokens"]
    scored = counted(identity["tokens"] - prompt, "scored token") + " of each" * (len(texts) > 1)
    settings = constants([run.config for run in runs])
    return [
        f"n = {counted(len(texts), 'text')} ({listed(texts)}), {scored} after a prompt of {prompt}",
        ", ".join(f"{name} {value}" for name, value in settings.items()).capitalize(),
    ]


def _looks(names: Iterable[str]) -> dict[str, Look]:
    return looks(names, {NAMES["quest"]: QUEST})


def _name(run: Run, preset: str | None = None) -> str:
    name, slots = label(run.config, preset), run.config.slots
    return name if slots == 1 else f"{name}, w = {slots}"


def any_window(run: Run, preset: str | None = None) -> str:
    """The name of a run of Quest or RetroAttention, or of a preset, without its window."""
    return label(replace(run.config, method="retro"), preset)
