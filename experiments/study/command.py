"""The command `study`: several models on several kinds of text, by the same configurations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retro_jax.experiments.io.flags import Flag, NoPrefix, Output, TextCommand, common_flags
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.settings import VARIED

if TYPE_CHECKING:
    from retro_jax import DecodeConfig
    from retro_jax.experiments.study.data import Cell

CommonFlags = common_flags(*VARIED)

WITHOUT_TOKENIZER = ", so it cannot read text; give a .npy file of token ids in --domains"
"""What a model without one is told."""


@dataclass(kw_only=True)
class Study(Output):
    """Measure on several models and kinds of text what a window repairs, what it could, and its rivals.

    Writes tables, a picture and block means of all runs. Each run is saved when it is finished: the same
    command continues where it was stopped. Without --models, tables and picture are made again from the block
    means in --out.
    """

    models: tuple[str, ...] = ()
    """As for `compare`: presets, hub ids, folders, .gguf files."""
    domains: tuple[Path, ...] = ()
    """Kinds of text: each a folder of .txt files, or a .npy file of token ids, and named as it is."""
    budgets: tuple[float, ...] = (128, 256, 512, 0.15)
    """What a step may load per layer and KV head: up to 1 a share of the context, above it tokens."""
    only: tuple[str, ...] = ()
    """Names of the variants to run; none: all. Quest always runs."""
    cache_dtype: tuple[str | None, ...] = ()
    """How keys and values are kept, int8 or float8_e4m3fn: full attention and all variants also run so, with
    the pages of the budget and with as many as its bytes pay. None, the model's dtype, runs anyway."""
    tokens: int | None = 8192
    """Length of each text, the prompt included; None: all tokens of the shortest of its kind."""
    prompt_tokens: int = 1024
    """Tokens at the beginning that are read at once with full attention and not scored."""
    dtype: str | None = None
    """Of weights, activations and a cache without --cache-dtype, "float32" or "bfloat16"; None: each model's
    own."""
    budgets_together: Flag[bool] = False
    """Decode the texts of all budgets as one batch: faster on an accelerator, and as many times the cache."""
    learned: tuple[Path, ...] = ()
    """Folders that `retro-jax learn` has written, one for each of --models: each adds a row."""
    out: Path
    """Folder for the results."""
    config: Annotated[CommonFlags, NoPrefix] = field(default_factory=CommonFlags)

    def run(self) -> None:
        """Runs what is not there yet, then writes and prints the tables."""
        from retro_jax.experiments.io.files import check_writable, print_json, read_json, write_bytes
        from retro_jax.experiments.study.data import ABOUT, load, save
        from retro_jax.experiments.study.picture import position_pictures
        from retro_jax.experiments.study.tables import page

        if bool(self.models) != bool(self.domains):
            raise ValueError("--models and --domains belong together: name at least one of each, or neither")
        check_writable(self.out)
        if self.models:
            save(self.out, self._measured())
        cells = load(self.out)
        report = page(cells)
        write_bytes(self.out / "tables.md", report.encode())
        ends = dict.fromkeys((cells[0].budgets[0], cells[0].budgets[-1]))
        for name, picture in position_pictures(cells, list(ends)).items():
            write_bytes(self.out / name, picture)
        if self.json:
            print_json(read_json(self.out / ABOUT))
        else:
            print(report)
            print(f"Tables, picture and block means: {self.out}")

    def configurations(self) -> "list[DecodeConfig]":
        """Returns full attention, and every variant at every budget, with every kind of cache.

        Raises:
          ValueError: a value is not possible, or `only` names no variant.
        """
        from dataclasses import replace

        from retro_jax.experiments.io.budgets import budget_fields
        from retro_jax.experiments.study.variants import QUEST, variants, with_caches
        from retro_jax.models.names import nearest

        for name in self.only:
            if name not in variants():
                told = nearest(name, variants())
                raise ValueError(f"--only has {name!r}{told}; use any of: {'; '.join(variants())}")
        if not self.budgets:
            raise ValueError("--budgets needs at least one value")
        chosen = {
            name: fields
            for name, fields in variants().items()
            if name == QUEST or not self.only or name in self.only
        }
        full = self.config.config(method="full", sink_pages=0)
        sparse = (
            replace(full, **fields, **({} if fields["method"] == "full" else budget_fields(budget)))
            for fields in with_caches(chosen, self.cache_dtype).values()
            for budget in self.budgets
        )
        return list(dict.fromkeys([full, *sparse]))

    def _learned(self) -> "dict[Path, list[DecodeConfig]]":
        """Returns what a learned score of each folder adds.

        Raises:
          ValueError: there is not one folder for each model, or one that the tables have no row for.
        """
        from dataclasses import replace

        from retro_jax.experiments.io.budgets import budget_fields
        from retro_jax.experiments.study.variants import LEARNED_CHANNELS, LEARNED_PAGES, learned
        from retro_jax.score_files import read_about

        if self.learned and len(self.learned) != len(self.models):
            raise ValueError(
                f"--learned has {len(self.learned)} folders for {len(self.models)} models; give one for each"
            )
        found, full = {}, self.config.config(method="full", sink_pages=0)
        for folder in self.learned:
            about = read_about(folder)
            for name, sizes in (("page_size", LEARNED_PAGES), ("channels", LEARNED_CHANNELS)):
                if about[name] not in sizes:
                    known = ", ".join(map(str, sizes))
                    raise ValueError(f"{folder} was trained with {name} {about[name]}; a study has {known}")
            _, fields = learned(about["page_size"], about["channels"])
            found[folder] = [replace(full, **fields, **budget_fields(budget)) for budget in self.budgets]
        return found

    def _measured(self) -> "list[Cell]":
        """Runs the comparison of each model and kind of text, in a folder of its own."""
        from retro_jax.experiments.compare.comparison import compare, identity
        from retro_jax.experiments.compare.folder import ComparisonFolder
        from retro_jax.experiments.io.identity import known_identity
        from retro_jax.experiments.study.data import cell, check_length

        configs = self.configurations()
        if self.tokens is not None:
            check_length(self.tokens, self.prompt_tokens)
        names = {_name(model): model for model in self.models}
        kinds = {path.resolve().name.removesuffix(".npy"): path for path in self.domains}
        for flag, given, told in (("models", self.models, names), ("domains", self.domains, kinds)):
            if len(told) < len(given):
                raise ValueError(f"--{flag} have {len(told)} different names ({', '.join(told)}); rename one")
        sources = {kind: _texts(path) for kind, path in kinds.items()}  # told before the first model is read
        learned = self._learned()
        copies = len(set(self.budgets)) if self.budgets_together else 1
        common, scores = configs, self.learned or [None] * len(names)
        cells = []
        for (name, model), score in zip(names.items(), scores, strict=True):
            configs = [*common, *learned.get(score, [])]
            for kind, texts in sources.items():
                source = TextCommand(
                    model=model,
                    dtype=self.dtype,
                    tokens=self.tokens,
                    prompt_tokens=self.prompt_tokens,
                    learned=score,
                    **texts,
                )
                asked = source.asked(copies)
                if source.text:
                    asked["without_tokenizer"] = WITHOUT_TOKENIZER
                source.check_known(configs, **asked)
                known = known_identity(source, configs[0], VARIED)
                ComparisonFolder.check(self.out / f"{name}-{kind}", known, partial=True)
                cells.append((name, kind, source, configs))
        found = []
        for name, kind, source, configs in cells:
            model, ids = source.read(configs, copies=copies)
            check_length(ids.ids.shape[1], self.prompt_tokens)
            what = identity(source.model, model, ids, configs[0])
            folder = ComparisonFolder(self.out / f"{name}-{kind}", what)
            runs = compare(model, ids, configs, folder, Progress, budgets_together=self.budgets_together)
            found.append(cell(name, kind, what, runs))
        return found


def _texts(path: Path) -> dict:
    """The fields of `TextCommand` for one kind of text."""
    if path.suffix == ".npy" and path.is_file():
        return {"token_ids": path}
    if not path.is_dir():
        raise FileNotFoundError(f"--domains has {path}, which is neither a folder nor a .npy file")
    files = tuple(sorted(path.glob("*.txt")))
    if not files:
        raise FileNotFoundError(f"--domains has {path}, a folder without .txt files")
    return {"text": files}


def _name(model: str) -> str:
    return Path(model).name.removesuffix(".gguf").replace(":", "-")
