"""Pages for a browser: what they hold, that they fetch nothing, and that no name gets out of its place."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from retro_jax import DecodeConfig
from retro_jax.experiments.compare.comparison import summary
from retro_jax.experiments.compare.folder import Run
from retro_jax.experiments.compare.html_page import ALL_TEXTS, comparison_page
from retro_jax.experiments.compare.sweep import Sweep
from retro_jax.experiments.io.files import finite
from retro_jax.experiments.io.settings import run_name
from retro_jax.experiments.pictures.pages import (
    Chart,
    Column,
    Series,
    Table,
    fields_tables,
    make_page,
    provenance_tables,
    table_page,
)
from retro_jax.experiments.pictures.panels import COLOURS, Scale

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '"><img src=x onerror=alert(1)>',
    "a\u2028b & c",
]
WHERE = {"date": "2026-01-02", "commit": "abc", "command": "retro-jax compare", "device": "cpu: c"}
WHERE |= {"versions": {"jax": "9"}}
SWEEP = Sweep((2, 4), (64, 128), page_sizes=(8, 16), sink_pages=(0, 1), methods=("tova",))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


class Parsed(HTMLParser):
    """The elements of a page as a browser takes them apart: tags with attributes, and scripts' contents."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], [[None, ""]]
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.texts.append([dict(attrs).get("id", tag), ""])

    def handle_data(self, data):
        self.texts[-1][1] += data

    def text(self, inside):
        return next(text for name, text in self.texts if name == inside)

    def json(self, inside):
        return json.loads(self.text(inside))


def a_comparison(texts=("a", "b"), sweep=SWEEP, scored=320):
    """A comparison's values and runs: excess grows with position, and falls with budget and window."""
    rng = np.random.default_rng(0)
    full, runs = rng.normal(3.0, 1.0, size=(len(texts), scored)), []
    for config in sweep.configurations(DecodeConfig()):
        dense = config.method == "full"
        excess = 0.0 if dense else 20 / config.budget_tokens / config.slots * np.linspace(0.5, 1.5, scored)
        exposure = np.array([np.nan]) if dense else 1 + 0.1 * np.arange(config.slots)
        loaded = 700 if dense else config.budget_tokens
        numbers = exposure, loaded / config.page_size, 1e4 * loaded, 1.5
        runs.append(Run(run_name(config), config, full + excess, *numbers, WHERE))
    identity = {"model": "m", "dtype": "float32", "texts": list(texts), "tokens": 60 + scored}
    identity |= {"prompt_tokens": 60, "config": {"dense_layers": 2}}
    return summary(identity, runs, 160), runs


@pytest.fixture(scope="module")
def compared():
    values, runs = a_comparison()
    return values, runs, Parsed(comparison_page(values, runs))


def chart_of(shown, title):
    """A chart with the settings of its lines by name."""
    (chart,) = (chart for chart in shown["charts"] if chart["title"] == title)
    return chart, {
        tuple(
            (name, values[place])
            for name, values, place in zip(chart["settings"], chart["values"], line["settings"], strict=True)
            if place is not None
        ): line
        for line in chart["lines"]
    }


def test_a_page_is_one_file_that_fetches_nothing(compared):
    _, _, page = compared
    assert not [
        (tag, name, value)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster", "style") or name.startswith("on")
    ]
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "img", "object", "embed", "base"} == set()
    (policy,) = (of["content"] for tag, of in page.tags if of.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    for words in ("@import", "url(", "fetch(", "XMLHttpRequest", "import("):
        assert words not in page.text("script") + page.text("style")
    assert "MIT License" in page.text("script") and "Leon Sorokin" in page.text("script")


def test_a_page_is_small(compared):
    _, _, page = compared
    assert len(page.text("script")) + len(page.text("style")) < 120_000


def test_the_page_of_a_comparison_has_its_results_as_they_are(compared):
    values, _, page = compared
    assert page.json("results") == json.loads(json.dumps(finite(values)))


def test_every_run_is_in_charts_tables_and_configuration(compared):
    values, runs, page = compared
    shown = page.json("shown")
    names = [run.name for run in runs]
    table, varying, same = shown["tables"][:3]
    by_text = {text: [row for row in table["rows"] if row[1] == text] for text in (ALL_TEXTS, "a", "b")}
    assert all([row[0] for row in of_text] == names for of_text in by_text.values())
    excess = [column["name"] for column in table["columns"]].index("excess NLL")
    assert by_text["a"][0][excess] is None
    for row, told in zip(by_text["b"][1:], values["per_text"]["b"][1:], strict=True):
        assert row[excess][0] == told["excess"]["mean"] and "±" in row[excess][1]
    assert [row[0] for row in varying["rows"]] == names
    fields = {column["name"] for column in varying["columns"][1:]} | {row[0] for row in same["rows"]}
    assert fields == set(DecodeConfig.__dataclass_fields__)
    chart, lines = chart_of(shown, "Excess by position")
    assert len(lines) == 3 * (len(runs) - 1) and chart["first"] == {"text": ALL_TEXTS}
    assert chart["panels"][0] == "budget" and chart["held"]["page size"] == DecodeConfig().page_size
    assert shown["colours"] == list(COLOURS)


def test_lines_join_runs_that_differ_in_one_setting(compared):
    values, _, page = compared
    shown = page.json("shown")
    titles = ["position", "budget", "page size", "window", "bytes read"]
    assert [chart["title"] for chart in shown["charts"]] == [*(f"Excess by {x}" for x in titles), "Exposure"]
    pooled = {row["run"]: row["excess"] for row in values["pooled"]}
    _, lines = chart_of(shown, "Excess by window")
    line = lines[
        ("method", "Retro"), ("budget", 64), ("page size", 16), ("sink pages", 0), ("group reduce", "mean"),
        ("text", ALL_TEXTS),
    ]  # fmt: skip
    assert line["x"] == [1, 2, 4]
    found = [pooled[f"{name}-b64-sinks0"] for name in ("quest", "retro-w2", "retro-w4")]
    assert line["y"] == pytest.approx([each["mean"] for each in found], rel=1e-5)
    assert line["high"] == pytest.approx([each["mean"] + each["error"] for each in found], rel=1e-5)
    _, lines = chart_of(shown, "Excess by budget")
    assert all(line["x"] == [64, 128] for line in lines.values())
    assert all(("budget" not in dict(told)) for told in lines)
    _, lines = chart_of(shown, "Exposure")
    assert {len(line["x"]) for line in lines.values()} == {2, 4}


def test_names_do_not_get_out_of_their_place():
    values, runs = a_comparison(HOSTILE, Sweep((4,), (64,)), scored=64)
    page = Parsed(comparison_page(values | {"model": HOSTILE[2]}, runs))
    assert [of.get("id") for tag, of in page.tags if tag == "script"] == ["results", "shown", None]
    assert page.json("results")["texts"] == HOSTILE
    assert {row[1] for row in page.json("shown")["tables"][0]["rows"]} == {ALL_TEXTS, *HOSTILE}
    assert page.text("h1").strip() == f"{HOSTILE[2]} (float32), compared"
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_what_is_not_finite_is_left_out():
    nan = float("nan")
    lines = [
        Series(
            {"method": "full"}, [3.0, 1.0, 2.0, 4.0], [1.0, 2.0, nan, 3.0], [0.5, nan, 1.0, 3.0], [1.5] * 4
        ),
        Series({"method": "Quest", "budget": 64}, [1.0], [float("inf")]),
    ]
    charts = [Chart("c", lines, Scale("x"), Scale("y")), Chart("none", lines[1:], Scale("x"), Scale("y"))]
    table = Table("t", [Column("a"), Column("b")], [[(nan, "nan"), nan], [1, (0.5, "0.50")]])
    shown = Parsed(make_page("t", [], charts, [table], {})).json("shown")
    (chart,) = shown["charts"]
    assert chart["lines"] == [
        {
            "settings": [0, None],
            "x": [1.0, 3.0, 4.0],
            "y": [2.0, 1.0, 3.0],
            "low": [None, 0.5, 3.0],
            "high": [1.5] * 3,
        }
    ]
    assert shown["tables"][0]["rows"] == [[[None, "nan"], None], [1, [0.5, "0.50"]]]
    with pytest.raises(ValueError, match="not JSON compliant"):
        table_page("t", [], [], {"a": nan})
    with pytest.raises(ValueError, match="t: a row has 1 cells for 2 columns"):
        table_page("t", [], [Table("t", [Column("a"), Column("b")], [[1]])], {})


def test_a_page_of_tables_alone():
    columns = [Column("method"), Column("task"), Column("score", "share right")]
    rows = [["full", "needles", (0.5, "0.50 [0.40, 0.60]")], ["quest", "needles", 0.25]]
    page = Parsed(
        table_page("Leaderboard", ["Of all."], [Table("Scores", columns, rows, choose=1)], {"n": 2})
    )
    shown = page.json("shown")
    assert shown["charts"] == [] and shown["tables"][0]["choose"] == 1
    assert shown["tables"][0]["rows"][0][2] == [0.5, "0.50 [0.40, 0.60]"] and page.json("results") == {"n": 2}


def test_configurations_and_provenance_say_what_differs_once():
    varying, same = fields_tables("C", {"one": {"a": 1, "b": None}, "two": {"a": 2, "b": None}})
    assert varying.rows == [["one", "1"], ["two", "2"]] and same.rows == [["b", "None"]]
    (alone,) = fields_tables("C", {"one": {"a": 1}})
    assert (alone.title, alone.rows) == ("C", [["a", "1"]])
    later = WHERE | {"date": "2026-01-03"}
    (one,) = provenance_tables([later, WHERE])
    told = dict(one.rows)
    assert (told["first date"], told["last date"], told["times"]) == ("2026-01-02", "2026-01-03", "2")
    assert (told["commit"], told["jax"], told["device"]) == ("abc", "9", "cpu: c")
    differing, _ = provenance_tables([WHERE, later | {"device": "gpu: g"}])
    assert [row[-1] for row in differing.rows] == ["cpu: c", "gpu: g"]


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_draws_it(tmp_path):
    values, runs = a_comparison(HOSTILE, scored=64)
    (tmp_path / "page.html").write_bytes(comparison_page(values, runs))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    arguments = [
        CHROMIUM,
        *options,
        "--virtual-time-budget=2000",
        "--dump-dom",
        f"file://{tmp_path}/page.html",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    drawn = done.stdout
    assert "This page did not work: $" in drawn and drawn.count("This page did not work") == 1  # its source
    assert drawn.count("<canvas") == 2  # a panel for each budget
    assert drawn.count('aria-pressed="true"') == 4 * 2  # Quest, two windows, TOVA; two sizes of pages
    _, table, *_ = drawn.split("<table")
    assert table.count("<tr>") == 1 + len(runs)
