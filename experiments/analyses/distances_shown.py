"""Distances from full attention in words: JSON values, tables and a picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Protocol

import numpy as np
from jaxtyping import Float

from retro_jax import DecodeConfig
from retro_jax.experiments.io.estimates import BLOCK, Estimate, estimate, ratio
from retro_jax.experiments.io.tables import markdown, number
from retro_jax.experiments.pictures.files import Layout, pictures
from retro_jax.experiments.pictures.panels import Curves, Line, Scale, looks
from retro_jax.experiments.pictures.words import counted, listed, shortened

QUANTITIES = {
    "keys": "distance of keys",
    "values": "distance of values",
    "outputs": "distance of attention outputs",
    "cosine": "cosine of the query with itself in its own step",
    "norm": "length of the query over that in its own step",
}
"""The fields of `Distances`, in words."""
IN_CACHE = ("keys", "values")
"""Those that are there at every age; the others while a token is in the window."""


class Finished(Protocol):
    """A case, see `distances.Case`."""

    name: str
    preset: str
    config: DecodeConfig
    blocks: object
    provenance: dict
    base: tuple


def summary(identity: Mapping, cases: Sequence[Finished], sparse_layers: Sequence[int]) -> dict:
    """Returns means with standard errors as JSON values.

    Args:
      identity: what the cases share.
      cases: in the order in which they are shown.
      sparse_layers: their numbers.
    """
    without = {case.base: case for case in cases if case.config.slots == 1}
    return {
        **identity,
        "sparse_layers": list(sparse_layers),
        "cases": {
            case.name: {
                "config": asdict(case.config),
                "window": case.config.slots,
                **{name: _by_age(name, case, identity["ages"]) for name in QUANTITIES},
                "of_no_window": _of_no_window(case, without.get(case.base)),
                "provenance": case.provenance,
            }
            for case in cases
        },
    }


def _by_age(name: str, case: Finished, ages: Sequence[int]) -> list[dict]:
    """At each age the mean over layers, and that of each layer."""
    values = getattr(case.blocks, name)
    return [
        {
            "age": int(age),
            **asdict(_mean(at_age.mean(axis=0))),
            "layers": [asdict(_mean(layer)) for layer in at_age],
        }
        for age, at_age in zip(ages if name in IN_CACHE else range(len(values)), values, strict=True)
    ]


def _of_no_window(case: Finished, other: Finished | None) -> dict | None:
    """What a window leaves of the distances that there are without one, once it has passed."""
    if other is None or case is other:
        return None
    return {
        name: asdict(_ratio(getattr(case.blocks, name)[-1], getattr(other.blocks, name)[-1]))
        for name in (*IN_CACHE, "outputs")
    }


def _mean(blocks: Float[np.ndarray, "B blocks"]) -> Estimate:
    return estimate(blocks.astype(float), block=1)


def _ratio(own: Float[np.ndarray, "L B blocks"], other: Float[np.ndarray, "L B blocks"]) -> Estimate:
    return ratio(own.mean(axis=0, dtype=float), other.mean(axis=0, dtype=float), block=1)


def _cell(point: Mapping | None, digits: int = 4) -> str:
    return "" if point is None else number(Estimate(point["mean"], point["error"]), digits)


def distances_report(values: dict) -> str:
    """Returns the result as Markdown.

    Args:
      values: of `summary`.
    """
    cases = values["cases"]
    parts = [
        f"# {values['model']} ({values['dtype']}): distance from full attention",
        f"{', '.join(values['texts'])}: {values['tokens']} tokens of each, a prompt of "
        f"{values['prompt_tokens']}, then teacher-forced decoding. {_settings(values)}.",
        "A case is named by preset, window (w), sink pages (s) and budget (b). Distances are the length of "
        "the difference over the length of what full attention has on the same text, all heads together. "
        "The age of a token is the number of steps since its own: with a window of w it is revised at ages 1 "
        "to w-1. All ages are of the same tokens; ± is one standard error, from the means of blocks of "
        f"{BLOCK} tokens.",
    ]
    compared = {name: case["of_no_window"] for name, case in cases.items() if case["of_no_window"]}
    if compared:
        names = (*IN_CACHE, "outputs")
        rows = [[name, *(_cell(point[part], 3) for part in names)] for name, point in compared.items()]
        parts += [
            "## What a window leaves",
            "Distance once the window has passed, over that without a window on the same tokens.",
            markdown(["", *names], rows),
        ]
    for name, words in QUANTITIES.items():
        ages = sorted({point["age"] for case in cases.values() for point in case[name]})
        rows = []
        for title, case in cases.items():
            points = {point["age"]: point for point in case[name]}
            rows.append([title, *(_cell(points.get(age)) for age in ages)])
        parts += [
            f"## {words.capitalize()}, by age",
            markdown(["mean of layers", *(f"age {age}" for age in ages)], rows),
        ]
    for name, words in QUANTITIES.items():
        rows = [
            [str(layer), *(_cell(case[name][-1]["layers"][place]) for case in cases.values())]
            for place, layer in enumerate(values["sparse_layers"])
        ]
        parts += [f"## {words.capitalize()} at the highest age, by layer", markdown(["layer", *cases], rows)]
    return "\n\n".join(parts) + "\n"


def _settings(values: dict) -> str:
    config = next(iter(values["cases"].values()))["config"]
    return f"Page size {config['page_size']}, dense layers {config['dense_layers']}"


def distances_pictures(values: dict) -> dict[str, bytes]:
    """Draws every quantity against age, and at the highest age against layers.

    Args:
      values: of `summary`.

    Returns:
      PNG files by name.
    """
    styles, layers = looks(values["cases"]), values["sparse_layers"]

    def lines(name: str, by_layer: bool) -> Iterable[Line]:
        for title, case in values["cases"].items():
            points = case[name][-1]["layers"] if by_layer else case[name]
            # A logarithmic axis has no age 0.
            x = layers if by_layer else [point["age"] + 1 for point in points]
            mean, error = (np.array([point[part] for point in points], float) for part in ("mean", "error"))
            yield Line(title, styles[title], x, mean, mean - error, mean + error)

    age, layer = Scale("age in tokens, plus 1", log=True, at_values=True), Scale("layer", whole=True)
    panels = []
    for name, words in QUANTITIES.items():
        y = Scale(words, shown=(1.0,) if name in ("cosine", "norm") else (0.0,))
        panels += [
            Curves(list(lines(name, False)), age, y, "by age, mean of layers"),
            Curves(list(lines(name, True)), layer, y, "by layer, at the highest age"),
        ]
    texts, prompt = values["texts"], values["prompt_tokens"]
    tokens = (values["tokens"] - prompt - values["ages"][-1]) // BLOCK * BLOCK
    notes = [
        f"n = {counted(len(texts), 'text')} ({listed(texts)}), {counted(tokens, 'token')} of each after a "
        f"prompt of {prompt}",
        "Names: preset, window (w), sink pages (s), budget (b)",
        _settings(values),
    ]
    title = f"{shortened(values['model'])} ({values['dtype']}): distance from full attention"
    layout = Layout(across=2, most=2 * len(QUANTITIES), panel=(4.6, 2.45))
    return pictures("distances", panels, title, notes, layout, "one standard error to each side")
