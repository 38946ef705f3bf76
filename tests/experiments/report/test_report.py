import json
import re

import numpy as np
import pytest

from retro_jax import DecodeConfig
from retro_jax.experiments.io.estimates import bootstrap
from retro_jax.experiments.report.data import difference, quest_of, read_run, read_runs, run_values
from retro_jax.experiments.report.page import make_page
from retro_jax.experiments.report.paper import PAPER, paper_rows
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.runs.folder import RunFolder, run_identity
from retro_jax.experiments.tasks.longgenbench import LongGenBench
from retro_jax.experiments.tasks.pg19 import PG19

METHODS = ("full", "quest-b128", "quest-b256", "retro-w4-b128", "retro-w4-b256")
RIGHT = {"full": 0.9, "quest-b128": 0.3, "quest-b256": 0.5, "retro-w4-b128": 0.4, "retro-w4-b256": 0.6}


def result(example, method, **values):
    pages = 0 if method == "full" else 8
    exposure = [1.0, 1.1, 1.2, 1.3] if "retro" in method else [1.0] if pages else [None]
    loaded = {"pages_loaded": pages, "kv_bytes": 5e6, "exposure": exposure}
    return {"example": example, "method": method, "sample": 0} | loaded | values


def a_run(path, task, lines, name="named", note=True, examples="x", device="cpu: c", replies=None, **config):
    config = RunConfig(**{"model": "m", "task": task, "budgets": (128, 256)} | config)
    identity = run_identity(name, config.identity(), config.configurations(), examples)
    with RunFolder(path, identity) as folder:
        folder.append(lines)
        if note:
            timing = {"batch": config.batch, "context": 900}
            folder.note("timings-0.jsonl", timing | {"method": "full", "steps_per_second": 20.0})
            folder.note("timings-0.jsonl", timing | {"method": "quest-b128", "steps_per_second": None})
            start = {"commit": "abc", "device": device, "versions": {"jax": "9"}}
            folder.note("provenance-0.jsonl", start | ({"replies": replies} if replies else {}))
    return path


def scored(n, examples=12):
    rng = np.random.default_rng(n)
    lines = []
    for index in range(examples):
        easy = rng.random(n)
        lines += [
            result(f"e{index}", method, scores=(easy < share).astype(float).tolist(), text="")
            for method, share in RIGHT.items()
        ]
    return lines


def test_bootstrap():
    values = np.random.default_rng(1).normal(2.0, 1.0, size=400)
    found = bootstrap(values)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std(ddof=1) / 20
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    for few in ([1.0], [1.0, 1.0], [1.0] * 5):  # no interval can be told from so few
        assert np.isnan(bootstrap(few).low) and bootstrap(few).text() == "1.000"
    assert bootstrap([1.0] * 6).text(1) == "1.0 [1.0, 1.0]"
    both = bootstrap(values, np.full(50, 4.0))  # each counts half, the second does not vary
    assert both.mean == pytest.approx(values.mean() / 2 + 2.0)
    assert both.high - both.mean == pytest.approx(half / 2, rel=0.1)


def test_differences_are_paired(tmp_path):
    lines = [
        result(f"e{i}", method, scores=[float(i), float(i) + shift])
        for i in range(9)
        for method, shift in (("full", 1.0), ("quest-b128", 0.0))
    ]
    lines.append(result("e9", "full", scores=[50.0, 0.0]))
    run = read_run(a_run(tmp_path / "a", LongGenBench(n=2), lines))
    found = difference(run, "quest-b128", "full")
    assert (found.mean, found.low, found.high) == (-0.5, -0.5, -0.5)  # e9 is not in both
    assert run.by_example("full")["e9"] == 25.0


def test_page(json_command, tmp_path):
    folders = [a_run(tmp_path / f"n{n}", LongGenBench(n=n), scored(n)) for n in (6, 3)]
    out = tmp_path / "pages" / "page.md"
    values = json_command("report", *folders, "--out", out)
    page = out.read_text()
    kinds = ("position", "budget", "exposure", "latency")
    names = {"page-questions.png", *(f"page-{i}-{kind}.png" for i in (1, 2) for kind in kinds)}
    assert {file.name for file in out.parent.iterdir()} == {"page.md", "page.html", *names}
    assert all((out.parent / name).read_bytes()[:4] == b"\x89PNG" and f"({name})" in page for name in names)
    assert "| gsm8k " in page and page.index("n = 3") < page.index("n = 6")
    assert "commit abc, cpu: c, jax 9" in page
    methods = values["runs"][0]["methods"]
    assert list(methods) == list(METHODS)
    assert methods["retro-w4-b128"]["minus_quest"]["mean"] == pytest.approx(
        methods["retro-w4-b128"]["value"]["mean"] - methods["quest-b128"]["value"]["mean"]
    )
    retro = methods["retro-w4-b128"]
    assert retro["minus_quest"]["mean"] > 0 > retro["minus_full"]["mean"]
    assert DecodeConfig(**retro["config"]) == DecodeConfig(window=4, budget_tokens=128)
    assert methods["quest-b128"]["minus_quest"] is None and methods["full"]["minus_full"] is None
    assert methods["retro-w4-b256"]["exposure"][-1] == pytest.approx(1.3)


def test_tokens_per_second_are_told_where_sequences_came_and_went(json_command, tmp_path):
    lines, task = some(scored(2), "full", "quest-b128"), LongGenBench(n=2)
    folder = a_run(tmp_path / "a", task, lines, batch=2)
    identity = json.loads((folder / "config.json").read_text())
    timing = {"batch": 2, "context": 900, "steps_per_second": None}
    with RunFolder(folder, identity) as other:
        for tokens, seconds in ((300, 2.0), (100, 3.0)):
            other.note("timings-0.jsonl", timing | {"method": "full", "tokens": tokens, "seconds": seconds})
    out = tmp_path / "page.md"
    (values,) = json_command("report", folder, "--out", out)["runs"]
    assert values["methods"]["full"]["tokens_per_second"] == 80.0
    assert values["methods"]["quest-b128"]["tokens_per_second"] is None
    (row,) = re.findall(r"^\| full .*", out.read_text(), re.MULTILINE)
    assert row.endswith(" 80.0 |") and "tokens/s" in out.with_suffix(".html").read_text()
    with RunFolder(folder, identity) as other:  # other sizes of batches are no mean of these
        other.note("timings-0.jsonl", timing | {"method": "full", "batch": 4, "tokens": 9, "seconds": 1.0})
    assert read_run(folder).tokens_per_second("full") is None


def test_a_report_does_not_depend_on_the_order_in_which_replies_were_finished(tmp_path):
    rng = np.random.default_rng(0)  # intervals of a few whole numbers would be the same in any order
    lines = [result(f"e{n:02}", name, scores=[rng.random()], text="") for n in range(12) for name in METHODS]
    by_method = sorted(reversed(lines), key=lambda line: METHODS.index(line["method"]))
    one, other = (
        run_values(read_run(a_run(tmp_path / name, LongGenBench(n=1), found)))
        for name, found in (("a", lines), ("b", by_method))
    )
    assert one == other and one["methods"]["full"]["value"]["low"] < one["methods"]["full"]["value"]["mean"]


def some(lines, *methods):
    return [line for line in lines if line["method"] in methods]


def test_folders_of_one_run_are_joined(json_command, tmp_path):
    lines = scored(4, examples=6)
    first = a_run(
        tmp_path / "a", LongGenBench(n=4), some(lines, "full", "quest-b128"), methods=("full", "quest")
    )
    second = some(lines, "full", "retro-w4-b128")
    second = [line | {"config": "another digest"} for line in second]
    second = a_run(
        tmp_path / "b", LongGenBench(n=4), second, methods=("full", "retro"), batch=2, device="gpu: g"
    )
    out = tmp_path / "page.md"
    (joined,) = json_command("report", first, second, "--out", out)["runs"]
    (whole,) = read_runs([a_run(tmp_path / "c", LongGenBench(n=4), lines)])
    assert list(joined["methods"]) == ["full", "quest-b128", "retro-w4-b128"]
    assert all(found["examples"] == 6 for found in joined["methods"].values())
    expected = difference(whole, "retro-w4-b128", "quest-b128")
    assert joined["methods"]["retro-w4-b128"]["minus_quest"]["mean"] == pytest.approx(expected.mean)
    page = out.read_text()
    assert "## named (a + b)" in page and "18 results of 6 examples" in page
    assert "commit abc, cpu: c, jax 9; commit abc, gpu: g, jax 9" in page
    assert (tmp_path / "page-1-latency.png").exists()


def test_runs_with_other_settings_are_not_joined(tmp_path):
    lines = some(scored(4, examples=2), "full")
    tasks = (LongGenBench(n=4), LongGenBench(n=4, shots=2))
    folders = [a_run(tmp_path / f"{number}", task, lines) for number, task in enumerate(tasks)]
    assert [len(run.paths) for run in read_runs(folders)] == [1, 1]


def test_parts_that_contradict_each_other_are_refused(failure, tmp_path):
    lines = some(scored(4, examples=2), "full")
    folders = [a_run(tmp_path / "a", LongGenBench(n=4), lines)]
    other = [lines[0], lines[1] | {"scores": [0.0, 0.0, 0.0, 0.5]}]
    folders.append(a_run(tmp_path / "b", LongGenBench(n=4), other))
    line = failure("report", *folders, "--out", tmp_path / "page.md")
    assert f"{folders[0]} and {folders[1]} have different results for e1, full, 0 (scores)" in line
    unlike = a_run(tmp_path / "c", LongGenBench(n=4), lines, examples="y")
    assert "have different examples" in failure("report", folders[0], unlike, "--out", tmp_path / "page.md")


def test_every_figure_of_the_paper_says_where_it_is_from():
    figures = {
        (table["model"], table["task"].get("source"), tuple(table.get("n", ())), figure["method"]): figure
        for table in PAPER["tables"]
        for figure in table["figures"]
    }
    found = figures["Qwen/Qwen2.5-14B-Instruct", "gsm8k", (15, 30, 45), "retro"]
    assert (found["window"], found["budget"], found["percent"]) == (2, 0.15, 4.4)
    found = figures["meta-llama/Llama-3.1-8B-Instruct", "gsm8k", (15, 30, 45), "full"]
    assert found["percent"] == 61.8  # 60.8 is another setting's
    others = [figure.get("percent") or figure["milliseconds"] for figure in PAPER["without_setting"]]
    assert others == [
        {"full": 47.3, "quest-0.05": 46.3},
        {"full": 60.8, "quest-0.05": 17.6},
        {"quest": 52.6, "quest reusing selections": 25.2},
        {"commonsenseqa": 3.0, "mmlu": 1.6, "gsm8k": 2.0},
        {"retro-w2": 1, "retro-w8": 2},
    ]
    assert all(figure["where"] for figure in PAPER["tables"])
    assert all("2508.09001" in figure["where"] and figure["what"] for figure in PAPER["without_setting"])


def test_figures_of_the_paper_stand_beside_runs_of_the_same_setting(json_command, tmp_path):
    shares = {"full": 0.75, "quest": 0.5, "retro-w2": 0.6, "retro-w4": 0.7}

    def a_paper_run(n, model="meta-llama/Llama-3.1-8B-Instruct", **task):
        lines = [
            result(f"e{index}", method, scores=[share + 0.01 * index] * n)
            for index in range(6)
            for method, share in shares.items()
        ]
        folder = tmp_path / f"{model[:4]}{n}{len(task)}"
        return read_run(
            a_run(folder, LongGenBench(n=n, **task), lines, model=model, windows=(2, 4), budgets=(0.15,))
        )

    runs = [a_paper_run(n) for n in (15, 30, 45)]
    rows = [row for row in paper_rows(runs) if not row["quantity"].startswith("exposure")]
    means = {row["method"]: row for row in rows if row["task"].endswith("15, 30, 45")}
    assert means.keys() == {"full", "quest", "retro-w2"}  # none for w = 4 in the paper
    assert {method: row["paper"] for method, row in means.items()} == {
        "full": 61.8,
        "quest": 52.6,
        "retro-w2": 56.5,
    }
    assert means["retro-w2"]["ours"]["mean"] == pytest.approx(62.5)
    assert 60.0 <= means["retro-w2"]["ours"]["low"] < 62.5
    (gain,) = (row for row in rows if row not in means.values())
    assert gain["task"].endswith("n = 45") and (gain["quantity"], gain["paper"]) == ("less Quest", 6.8)
    assert gain["ours"]["mean"] == pytest.approx(10.0)
    after = paper_rows(runs[:1])
    assert {row["quantity"] for row in after} == {"exposure after 1"} and after[0]["paper"] == 1.17
    assert after[0]["ours"]["mean"] == pytest.approx(1.1)
    for other in (a_paper_run(45, model="other"), a_paper_run(45, source="mmlu")):
        assert all(row["quantity"] == "exposure after 1" for row in paper_rows([other]))

    values = json_command("report", *(run.paths[0] for run in runs), "--out", tmp_path / "page.md")
    assert len(values["paper"]) == len(paper_rows(runs))
    assert "## Beside the paper" in (tmp_path / "page.md").read_text()


def test_likelihoods(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for index in range(6):
        base = rng.normal(3, 1, size=600)
        for number, method in enumerate(METHODS):
            lines.append(result(f"b{index}", method, nll=(base + 0.1 * number).tolist()))
    run = read_run(a_run(tmp_path / "a", PG19(prompt_tokens=100, tokens=700), lines, note=False))
    page, pictures = make_page([run], "p")
    assert set(pictures) == {"p-1-excess.png", "p-1-budget.png", "p-1-exposure.png"}
    assert "0.300 [0.300, 0.300]" in page and "0.200 [0.200, 0.200]" in page  # less full, less Quest


def test_a_run_without_scores_says_so(tmp_path):
    lines = [result("e", method, scores=[], text="x") for method in METHODS]
    page, pictures = make_page([read_run(a_run(tmp_path / "a", LongGenBench(n=2), lines))], "p")
    assert page.count("not scored") == len(METHODS)
    assert set(pictures) == {"p-1-exposure.png", "p-1-latency.png"}


@pytest.mark.parametrize(("replies", "full"), [(6, "full has 4 of 6, "), (None, "")])
def test_an_unfinished_run_says_what_is_missing(json_command, tmp_path, replies, full):
    lines = [line for line in scored(4, 4) if line["method"] in ("full", "quest-b128")][:-1]
    folder = a_run(tmp_path / "a", LongGenBench(n=4), lines, replies=replies)
    (values,) = json_command("report", folder, "--out", tmp_path / "page.md")["runs"]
    planned = replies or 4  # as many as any method has, where no start tells
    page = (tmp_path / "page.md").read_text()
    few, none = f"quest-b128 has 3 of {planned}", f"quest-b256 has 0 of {planned}"
    assert f"**Unfinished.** Replies: {full}{few}, {none}, " in page
    assert "- Quest, same budget" in page
    assert values["missing"]["retro-w4-b256"] == {"replies": 0, "planned": planned}
    assert ("full" in values["missing"]) == bool(replies)


def test_parts_that_are_a_whole_run_together_miss_nothing(tmp_path):
    lines, kinds = scored(4, examples=2), {"full": ["full"], "quest": ["quest-b128", "quest-b256"]}
    kinds["retro"] = ["retro-w4-b128", "retro-w4-b256"]
    folders = [
        a_run(tmp_path / kind, LongGenBench(n=4), some(lines, *labels), replies=2, methods=(kind,))
        for kind, labels in kinds.items()
    ]
    (whole,) = read_runs(folders)
    assert whole.missing == {} and len(whole.planned) == 5
    assert "Unfinished" not in make_page([whole], "p")[0]


def test_values_that_are_not_finite_are_shown_as_such(tmp_path):
    lines = [result(f"b{index}", method, nll=[3.0, None]) for index in range(2) for method in METHODS]
    page, _ = make_page(
        [read_run(a_run(tmp_path / "a", PG19(prompt_tokens=1, tokens=3), lines, note=False))], "p"
    )
    assert re.search(r"\| full +\| +2 \| +nan ", page)


def test_presets_stand_beside_the_quest_of_the_run(tmp_path):
    varied = {"presets": ("quest", "retro"), "budgets": (128,)}
    configs = RunConfig(model="m", task=LongGenBench(n=2), **varied).configurations()
    lines = [result("e", method, scores=[float(place)]) for place, method in enumerate(configs)]
    run = read_run(a_run(tmp_path / "a", LongGenBench(n=2), lines, **varied))
    assert run.configs == configs
    full, quest, retro, preset_quest, preset_retro = configs
    found = {method: quest_of(run, method) for method in configs}
    assert found == {full: None, quest: None} | dict.fromkeys((retro, preset_quest, preset_retro), quest)
    assert {row["method"] for row in paper_rows([run])} == {retro}  # preset retro is another method


def test_a_folder_of_an_earlier_version_is_read_and_not_continued(tmp_path):
    """Its config.json has the flags of the run alone, and its labels are of another form."""
    earlier = {"quest-b128": "quest-128", "retro-w4-b256": "retro-w4-256", "full": "full"}
    lines = some(scored(4, examples=2), *earlier)
    folder = a_run(tmp_path / "a", LongGenBench(n=4), lines)
    now = read_run(folder)
    identity = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in identity.items() if k != "methods"}))
    for file in (folder / "results-0.jsonl", folder / "timings-0.jsonl"):
        found = map(json.loads, file.read_text().splitlines())
        file.write_text("".join(json.dumps(x | {"method": earlier[x["method"]]}) + "\n" for x in found))
    then = read_run(folder)
    assert (then.lines, then.configs, then.planned) == (now.lines, now.configs, now.planned)
    assert [timing["method"] for timing in then.timings] == ["full", "quest-b128"]
    with pytest.raises(ValueError, match=r"another run \(of an earlier version; retro-jax report still"):
        RunFolder(folder, identity)
    assert "quest-128" in (folder / "results-0.jsonl").read_text()


def test_a_preset_of_an_earlier_version_is_not_taken_for_what_has_its_name_now(tmp_path):
    folder = a_run(tmp_path / "a", LongGenBench(n=4), scored(4, examples=2), presets=("retro",))
    identity = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in identity.items() if k != "methods"}))
    with pytest.raises(ValueError, match=r"another version's \(what preset retro was is not told\)"):
        read_run(folder)


def test_refused(failure, tmp_path):
    folder = a_run(tmp_path / "a", LongGenBench(n=2), scored(2, examples=2))
    page = tmp_path / "page.md"
    assert "is not a run's folder" in failure("report", tmp_path / "no", "--out", page)
    assert "is no Markdown page" in failure("report", folder, "--out", tmp_path / "page.html")
    page.write_text("mine")
    assert "exists; choose another --out, or pass --overwrite" in failure("report", folder, "--out", page)
    assert page.read_text() == "mine"
    with RunFolder(tmp_path / "empty", {"name": "x", "config": {}, "examples": ""}):
        pass
    assert "has no results yet" in failure("report", tmp_path / "empty", "--out", tmp_path / "new.md")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("config.json", "", r"config\.json is damaged \(it is empty\)"),
        ("config.json", '{"name"', r"config\.json is damaged \(Expecting ':'.*restore it, or start anew"),
        ("config.json", '{"model_type": "llama"}', r"config\.json is not a run's: it has no 'name'"),
        ("results-0.jsonl", '{"method": "full"}\n', r"results-0\.jsonl line 1 has no 'example'"),
        ("timings-0.jsonl", '{"method": "full"}\n', r"timings-0\.jsonl line 1 has no 'batch'"),
        ("provenance-0.jsonl", "{}\n", r"provenance-0\.jsonl line 1 has no 'commit'"),
        (
            "results-1.jsonl",
            '{"example": "a", "method": "full", "sample": 0}\n',
            r"a, full, 0 has no 'scores'; were two",
        ),
        (
            "results-1.jsonl",
            '{"example": "a", "method": "quest-b9", "sample": 0}\n',
            r"results of 'quest-b9', which is no method of its run; were two",
        ),
    ],
)
def test_damaged_folders(tmp_path, name, contents, message):
    folder = a_run(tmp_path / "a", LongGenBench(n=2), scored(2, examples=2))
    (folder / name).write_text(contents)
    with pytest.raises(ValueError, match=message):
        read_run(folder)
