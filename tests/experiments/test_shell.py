"""The command line among other programs: streams, signals, narrow terminals, names that are nearly right."""

import ast
import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import retro_jax
from retro_jax import DecodeConfig
from retro_jax.experiments import cli
from retro_jax.experiments.generate.words import covered
from retro_jax.experiments.runs.run import TERMINATED
from retro_jax.experiments.study.variants import with_caches
from retro_jax.methods import METHODS
from retro_jax.models.formats import wheel
from retro_jax.models.presets import SIZES, WHEELS
from retro_jax.presets import EARLIER_NAMES, PRESETS

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, "-c", "from retro_jax.experiments.start import main; main()"]  # as the script does
FULL_DISK = Path("/dev/full")


def start(*arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, "text": True} | options
    return subprocess.Popen([*COMMAND, *arguments], **options)


def test_help_and_version_come_without_jax():
    shown = "[], ['generate'], ['score'], ['compare'], ['overlap'], ['report'], ['run'], ['bench']"
    shown += ", ['run', 'smollm2-recall'], ['bench', 'decode']"
    code = f"""
import sys
from retro_jax.experiments.cli import main
for words in ({shown}):
    try:
        main([*words, "--help"])
    except SystemExit as stop:
        assert not stop.code
try:
    main(["--version"])
except SystemExit as stop:
    assert not stop.code
heavy = {{"jax", "matplotlib", "huggingface_hub", "gguf", "flax"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "smollm2-recall" in done.stdout and "--budget-tokens" in done.stdout
    assert f"retro-jax {version('retro-jax')}, jax {version('jax')}" in done.stdout
    assert retro_jax.__version__ == version("retro-jax")


TAB = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_tyro_retro_jax
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""What bash does when the last of some words is to be completed."""


@pytest.fixture
def completion(monkeypatch, capsys):
    """Prints the completion of four commands, one of them a group of two."""
    names = ("smollm2-recall", "smollm2-longgenbench")
    run = cli.Group("Run.", lambda runs=cli._runs: {name: runs()[name] for name in names})
    kept = {name: cli.COMMANDS[name] for name in ("score", "compare", "study")}
    monkeypatch.setattr(cli, "COMMANDS", kept | {"run": run})

    def completion(shell):
        with pytest.raises(SystemExit) as stop:
            cli.main(["--print-completion", shell])
        assert not stop.value.code
        return capsys.readouterr().out

    return completion


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_has_the_flags_that_help_has(completion, shell, capsys):
    (line,) = (line for line in completion(shell).splitlines() if line.startswith("COMPLETION_SPEC = "))
    if shell == "fish":  # within its quotes
        line = re.sub(r"\\([\\\"$])", r"\1", line)
    spec = ast.literal_eval(line.removeprefix("COMPLETION_SPEC = "))
    recall = spec["subcommands"]["run"]["subcommands"]["smollm2-recall"]
    for words, command in ((["score"], spec["subcommands"]["score"]), (["run", "smollm2-recall"], recall)):
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        told = set(re.findall(r"^\W*(--[a-z][a-z.-]+)", capsys.readouterr().out, re.MULTILINE))
        flags = {option["flags"][0] for option in command["options"]} - {"-h"}
        flags = {flag for flag in flags if flag.startswith("-")}  # a command on one model has models beside
        assert flags == told and len(flags) > 20
        assert not any("\n" in option["description"] for option in command["options"])


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes(completion, tmp_path):
    (tmp_path / "retro-jax.bash").write_text(completion("bash"))

    def tab(*words):
        arguments = [
            "bash",
            "--norc",
            "-c",
            TAB,
            "bash",
            str(tmp_path / "retro-jax.bash"),
            "retro-jax",
            *words,
        ]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert tab("") == {"run", "score", "compare", "study", "-h", "--help"}
    assert tab("run", "smollm2-r") == {"smollm2-recall"}
    assert tab("run", "smollm2-recall", "--task.co") == {"--task.count"}
    assert tab("score", "some-model", "--preset", "") == {*PRESETS, *EARLIER_NAMES, "None"}
    assert tab("score", "smol") == set(WHEELS)
    assert tab("score", "random", ":", "tin") == {"tiny"}  # bash splits words at colons
    assert {"tiny", "llama3.1-8b"} < tab("score", "random", ":")
    assert tab("score", "random", ":", "tiny", "--method", "qu") == {"quest"}
    assert tab("score", "some-model", "--method", "") == set(METHODS)
    assert tab("run", "smollm2-recall", "--methods", "full", "qu") == {"quest"}
    assert not {*WHEELS} & tab("run", "smollm2-recall", "")  # whose argument is no model
    assert tab("study", "--models", "some-model", "smol") == set(WHEELS)
    assert tab("study", "--models", "random", ":", "tin") == {"tiny"}
    assert tab("compare", "some-model", "--methods", "") == {"streaming", "tova", "h2o", "snapkv", "expected"}


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_files(completion, tmp_path):
    (tmp_path / "retro-jax.bash").write_text(completion("bash"))
    (tmp_path / "a book").mkdir()
    (tmp_path / "a book" / "two.txt").touch()
    (tmp_path / "one.txt").touch()
    typed = {
        "score model --text on\t a\tt\t": ["score", "model", "--text", "one.txt", "a book/two.txt"],
        # A model may be a folder.
        "score a\t --token-ids one\t": ["score", "a book/", "--token-ids", "one.txt"],
        "sc\t smol\t --bin\t": ["score", "smollm2-135m", "--bin-tokens"],
    }
    lines = [
        "source retro-jax.bash",
        "retro-jax() { printf '%s\\n' \"$@\" . >> typed; }",
        *(f"retro-jax {line}" for line in typed),
        "exit",
    ]
    terminal, side = pty.openpty()
    bash = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(bash, stdin=side, stdout=side, stderr=side, cwd=tmp_path, start_new_session=True):
        os.close(side)
        os.write(terminal, "".join(f"{line}\n" for line in lines).encode())
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while os.read(terminal, 4096):
                pass
    os.close(terminal)
    assert (tmp_path / "typed").read_text().splitlines() == [
        word for words in typed.values() for word in (*words, ".")
    ]


def test_fish_completes_files_by_a_program_that_is_no_argument(completion):
    script = completion("fish")
    assert "--no-files" not in script and "| $python_cmd - $words $current" in script


def test_completion_is_the_same_in_every_process(completion):
    (line,) = (line for line in completion("bash").splitlines() if line.startswith("COMPLETION_SPEC = "))
    options = ast.literal_eval(line.removeprefix("COMPLETION_SPEC = "))["subcommands"]["score"]["options"]
    (choices,) = (option["choices"] for option in options if "--preset" in option["flags"])
    assert choices == sorted([*PRESETS, *EARLIER_NAMES, "None"])  # as tyro tells them in the order of a set


def test_exit_statuses_are_documented():
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    told = {int(status) for status in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert told == {0, 2, cli.INTERRUPTED, cli.UNREAD, TERMINATED}


def test_completion_is_for_shells_that_it_knows(failure):
    line = failure("--print-completion", "csh")
    assert "--print-completion has 'csh'; it needs one of bash, zsh, fish" in line
    assert "it needs one of" in failure("--print-completion")
    assert "--print-completion has ''; it needs" in failure("--print-completion=")
    assert "has 'bash zsh'" in failure("--print-completion=bash", "zsh")
    assert "is no command" in failure("--print-completions=bash")


@pytest.mark.parametrize("arguments", [("--print-completion", "zsh"), ("--print-completion=zsh",)])
def test_the_shell_may_follow_an_equals_sign(command, monkeypatch, arguments):
    monkeypatch.setattr(cli, "_completion", lambda *shells: f"of {shells}")
    assert command(*arguments)[1:] == ("of ('zsh',)\n", "")


def test_none_in_a_list_is_what_runs_anyway():
    def configurations(*lists):
        flags = ["--cache-tokens", "512", "--budgets", "256", *lists]
        command = cli._read(["compare", "random:tiny", *flags])
        return command.sweep.configurations(command.config.config(method="full", sink_pages=0))

    lists = ("--cache-dtype", "int8", "--evict", "tova")
    with_none = ("--cache-dtype", "None", "int8", "--evict", "tova", "None")
    assert set(configurations(*with_none)) == set(configurations(*lists))
    assert len(configurations(*with_none)) == len(configurations(*lists))
    studies = [
        cli._read(
            ["study", "--models", "random:tiny", "--domains", "x", "--out", "y", "--cache-dtype", *dtypes]
        )
        for dtypes in (("int8",), ("None", "int8"))
    ]
    one, other = ([*with_caches({"quest": {"method": "quest"}}, study.cache_dtype)] for study in studies)
    assert one == other


def test_a_reader_who_leaves_ends_it_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    process = start("--help", stdout=writer)
    os.close(writer)
    assert (process.communicate()[1], process.returncode) == ("", 128 + signal.SIGPIPE)


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with FULL_DISK.open("w") as full:
        process = start("--version", stdout=full)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("retro-jax: error: ") and "No space left" in err and err.count("\n") == 1


def test_narrow_terminals_get_help():
    process = start("generate", "--help", env=os.environ | {"COLUMNS": "5"})
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--max-new-tokens" in out


SLOW_IMPORT = """
import signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a job in the background starts ignores it

class SlowImport:
    def find_spec(self, name, path=None, target=None):
        if name == SLOW:
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, SlowImport())
"""


@pytest.mark.parametrize("slow", ["jax", "retro_jax.experiments.cli"])
def test_stopped_while_it_imports(tmp_path, slow):
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT.replace("SLOW", repr(slow)))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = start("generate", "random:tiny", "--prompt", "x", env=os.environ | {"PYTHONPATH": path})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (err, process.returncode) == ("\nretro-jax: stopped\n", 130)


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (
            ("genrate",),
            "'genrate' is no command (did you mean 'generate'?); use retro-jax with one of",
        ),
        (("run", "smollm2-recal"), "(did you mean 'smollm2-recall'?)"),
        (("bench", "kernel"), "(did you mean 'kernels'?)"),
        (("generate", "smolm2-135m", "--prompt", "x"), "(did you mean 'smollm2-135m'?)"),
        (("generate", "random:llama3-8", "--prompt", "x"), "(did you mean 'llama3-8b'?)"),
        (("generate", "random:tiny", "--prompt", "x", "--method", "qest"), "(did you mean 'quest'?)"),
        (("generate", "random:tiny", "--prompt", "x", "--score", "mean_keys"), "(did you mean 'mean_key'?)"),
        (("compare", "random:tiny", "--methods", "snap_kv"), "(did you mean 'snapkv'?)"),
        (("compare", "random:tiny", "--presets", "papr"), "(did you mean 'paper'?)"),
        (("run", "smollm2-recall", "--methods", "tovva"), "(did you mean 'tova'?)"),
        (("run", "llama3.1-8b-longgenbench-gsm8k", "--task.source", "gsm8"), "(did you mean 'gsm8k'?)"),
    ],
)
def test_the_nearest_name_is_told(failure, arguments, near):
    assert near in failure(*arguments)


def test_names_that_are_not_near_suggest_nothing(failure):
    assert "did you mean" not in failure("frobnicate")
    assert "a command is missing; use retro-jax with one of generate, " in failure()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "./no-model"), "there is no folder no-model"),
        (("generate", "a/b/c"), "there is no folder a/b/c"),
        (("generate", "no.gguf"), "there is no GGUF file no.gguf"),
        (("generate", str(Path(__file__))), "test_shell.py is a file and no .gguf file"),
        (("score", "random:tiny", "--text", "no.txt"), "there is no file no.txt"),
        (("score", "nobody/knows", "--text", "no.txt"), "there is no file no.txt"),  # before any download
    ],
)
def test_what_is_not_there_is_called_that(failure, arguments, message):
    extra = ("--prompt", "x") if arguments[0] == "generate" else ()
    assert message in failure(*arguments, *extra)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (MemoryError(), "out of memory (of this machine); use fewer tokens"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: 9 GB"),
            "out of memory (RESOURCE_EXHAUSTED: 9 GB); use",
        ),
        (KeyError("scores"), "KeyError: 'scores'; --traceback shows where it was raised"),
        (AssertionError(), "AssertionError; --traceback shows where it was raised"),
        (OSError(28, "No space left on device", "x"), "No space left on device: 'x'"),
    ],
)
def test_errors_are_words(failure, monkeypatch, raised, message):
    def fail(*_):
        raise raised

    monkeypatch.setattr(cli, "_read", fail)
    assert message in failure("generate")
    with pytest.raises(type(raised)):
        cli.main(["generate", "--traceback"])


@pytest.mark.parametrize("reason", [AssertionError(), RuntimeError("Unable to initialize backend 'x'")])
def test_a_platform_that_does_not_start_is_named(failure, monkeypatch, ids_file, reason):
    def fail():
        raise reason

    monkeypatch.setattr(jax, "local_devices", fail)
    line = failure("generate", "random:tiny", "--token-ids", ids_file)
    assert "JAX cannot start with JAX_PLATFORMS=cpu" in line and "unset it" in line
    assert str(reason) in line


def test_models_need_a_folder_that_can_be_written(failure, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RETRO_JAX_CACHE", str(tmp_path / "file" / "cache"))
    assert "set RETRO_JAX_CACHE" in failure("generate", "smollm2-135m", "--prompt", "x")

    def homeless(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RETRO_JAX_CACHE")
    monkeypatch.setattr(wheel.Path, "expanduser", homeless)
    with pytest.raises(OSError, match="no home folder to keep models in; set RETRO_JAX_CACHE"):
        wheel.cache_folder()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (DecodeConfig(budget_tokens=112), "the budget of 112 tokens covers all 100 tokens of context"),
        (
            DecodeConfig(),
            "the budget of 256 tokens covers all 100 tokens of context, so 'retro' did what full",
        ),
        (DecodeConfig(budget_tokens=96), ""),
        (DecodeConfig("full"), ""),
        (DecodeConfig(budget_tokens=96, dense_layers=4), "no layer of tiny is sparse"),
    ],
)
def test_a_budget_that_covers_the_context_is_told(config, told):
    result = SimpleNamespace(config=config, state=SimpleNamespace(length=np.array([60, 100])), metrics=True)
    line = covered(result, SimpleNamespace(config=SIZES["tiny"]))
    assert told in line and bool(told) == bool(line)
