"""What completes a command line in a shell: commands and flags, as tyro tells them, and names that they take.

Names are not choices of the flags themselves, which say in words what is near to a wrong one.
"""

import ast
import contextlib
import io
import re
from collections.abc import Collection, Mapping, Sequence

import tyro

PREFIX = "COMPLETION_SPEC = "
"""Of the line of a script that tells commands and flags, in Python."""
JOINED = 'all_subcommands = set(spec.get("subcommands", {}).keys())'
"""In a script, the names of commands that bash has split at colons, which are put together again."""

CHANGED = {
    # Where nothing else can follow, what follows is a file.
    "get_completions(words, current_index, COMPLETION_SPEC)": (
        "get_completions(words, current_index, COMPLETION_SPEC) or ['__TYRO_COMPLETE_FILES__']"
    ),
    # In bash, files as it completes them for any command: spaces are quoted, folders end with a slash.
    "complete -F": "complete -o bashdefault -o default -F",
    'COMPREPLY=($(compgen -f -- "$cur"))': "COMPREPLY=()",
    # In fish the same, and a pipe: Linux takes no argument as long as the program.
    "complete --no-files": "complete",
    '($python_cmd -c "$pycode" $words $current)': (
        "(printf '%s' \"$pycode\" | $python_cmd - $words $current)"
    ),
    # In bash, which word belongs to the one after it: only what stands before a colon.
    'elif [[ "$prev" != "${COMP_WORDS[0]}"': 'elif [[ "$cur" == :* && "$prev" != "${COMP_WORDS[0]}"',
}
"""What a script says, and what it is to say."""


def completion(commands: object, shell: str, on_model: Collection[str] = ()) -> str:
    """Returns the script for a shell.

    Args:
      commands: all of them as one type that tyro reads.
      shell: that tyro knows.
      on_model: words of those whose argument is a model.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            tyro.cli(commands, prog="retro-jax", args=["--tyro-print-completion", shell])
    except SystemExit as stop:
        if stop.code:
            raise
    names, script = _names(on_model), printed.getvalue()
    for said, wanted in CHANGED.items():
        script = script.replace(said, wanted)
    lines = script.splitlines()
    split = sorted({name for own in names.values() for some in own.values() for name in some if ":" in name})
    for number, line in enumerate(lines):
        if line.startswith(PREFIX):
            told = line.removeprefix(PREFIX)
            if shell == "fish":  # within its quotes
                told = re.sub(r"\\([\\\"$])", r"\1", told)
            told = repr(_named(ast.literal_eval(told), names))
            if shell == "fish":
                told = re.sub(r"([\\\"$])", r"\\\1", told)
            lines[number] = PREFIX + told
        elif line.strip() == JOINED:
            lines[number] += f".union({split})"
    return "\n".join(lines)


def _names(on_model: Collection[str]) -> Mapping[str, Mapping[str, Sequence[str]]]:
    """By the word of a command, the names that its flags take, and its argument (""); by "" those of all."""
    from retro_jax.methods import METHODS
    from retro_jax.models.presets import SIZES, WHEELS
    from retro_jax.presets import PRESETS
    from retro_jax.selectors import SELECTORS

    models = [*WHEELS, *(f"random:{size}" for size in SIZES)]
    methods, scores, presets = list(METHODS), list(SELECTORS), list(PRESETS)
    found = {word: {"": models} for word in on_model}
    beside = [name for name, method in METHODS.items() if not method.dense and not method.scored]
    found["compare"] = found.get("compare", {}) | {"--methods": beside}  # others run there anyway
    found[""] = {"--method": methods, "--methods": methods, "--score": scores, "--scores": scores}
    found[""] |= {"--presets": presets, "--models": models}
    return found


def _named(spec: dict, names: Mapping[str, Mapping[str, Sequence[str]]], command: str = "") -> dict:
    """A command's options and those of the commands under it, with names where they take some."""
    here = {**names[""], **names.get(command, {})}
    options = []
    for option in spec["options"]:
        # Candidates are lines, so that an explanation of two lines would give a second one.
        option = option | {"description": " ".join(option["description"].split())}
        if (flag := option["flags"][0]) in here:
            option |= {"type": "choice", "choices": here[flag]}
        elif "choices" in option:  # in the order of a set, which is another in every process
            option |= {"choices": sorted(option["choices"])}
        options.append(option)
    options += [{"flags": [name], "description": "a model", "type": "flag"} for name in here.get("", ())]
    under = {word: _named(other, names, word) for word, other in spec["subcommands"].items()}
    return spec | {"options": options, "subcommands": under}
