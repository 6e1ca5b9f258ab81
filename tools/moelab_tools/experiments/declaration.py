"""An experiment as it is declared before its first run: experiment.yaml as dataclasses, with a hash of all it says."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from moelab.config.files import config_folder, file_layers, find_config, is_override, override_layer
from moelab.config.load import load_config
from moelab.config.scalars import settle
from moelab.config.typed import default_of
from moelab.errors import ConfigError, near
from moelab.paths import user_path
from moelab.planning.match import MEASURES
from moelab.safe_files import Reading, read_bytes
from moelab_tools.compare.budgets import AXES
from moelab_tools.compare.pairing import LEAST_PAIRS
from moelab_tools.compare.sequential import SPENDING
from moelab_tools.experiments.logged import Logged
from moelab_tools.experiments.reaching import WORDS, Reaching
from moelab_tools.experiments.routing import Routing
from moelab_tools.sweep.axes import OURS, whole_numbers
from moelab_tools.sweep.plan import digest

FILE, RESULTS = "experiment.yaml", "results"
END = "end"  # the axis of the last evaluation, whatever each run spent
REFERENCE = "@"  # train.init_from=@dense, data.source.path=@corpus/tokens: what the step of that name prepared
INIT = "train.init_from"
KINDS = ("train", "upcycle", "align", "data")  # of steps
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*(?:_[A-Za-z0-9.+-]+)*")


@dataclass
class Step:
    """What variants start from: weights, made once for each seed, or a corpus, made once. Exactly one of KINDS."""

    name: str = MISSING
    train: list[str] | None = None  # arguments of moelab train
    upcycle: list[str] | None = None  # arguments of moelab upcycle; its seed is the experiment's
    source: str | None = None  # of an upcycling: the earlier step whose dense weights it takes
    align: list[str] | None = None  # arguments of moelab align, of one stage
    data: list[str] | None = None  # arguments of moelab data

    @property
    def words(self) -> list[str]:
        """The arguments, of whichever command."""
        return next((words for kind in KINDS if (words := getattr(self, kind)) is not None), [])

    @property
    def trains(self) -> bool:
        """Whether a run comes of it."""
        return self.train is not None or self.align is not None


@dataclass
class Budget:
    """What the experiment may take in all; null: no limit."""

    minutes: float | None = None  # of this machine; asked before each look's runs are started
    runs: int | None = None  # trained variants, preparation not counted
    tokens: float | None = None  # of these runs


@dataclass
class Protocol:
    """How runs become words (docs/compare.md)."""

    axis: str = END  # end, or at equal tokens, flops or seconds
    error: float = 0.05  # how often any word may be false, of all variants and looks together
    practical: float = 0.1  # % of the loss: less is negligible
    looks: list[int] = field(default_factory=list)  # numbers of seeds at which one looks; []: at the end alone
    spending: str = "obrien_fleming"  # of the error over looks: obrien_fleming or pocock
    give_up: bool = True  # stop when no variant has a tenth of a chance of a word any more


@dataclass
class ExperimentConfig:
    """All of an experiment.yaml."""

    question: str = MISSING
    configs: list[str] = field(default_factory=list)  # files that all variants share; relative to this one
    variants: dict[str, list[str]] = field(default_factory=dict)  # name -> files and overrides laid over them
    baseline: str = MISSING  # a variant
    seeds: str | list[int] = "0..2"
    prepare: list[Step] = field(default_factory=list)
    match: str | None = None  # give every variant the baseline's active or total parameters, or flops
    budget: Budget = field(default_factory=Budget)
    protocol: Protocol = field(default_factory=Protocol)
    decision: dict[str, str] = field(default_factory=dict)  # verdict -> what is then concluded, of each variant
    lengths: Reaching | None = None  # what the runs make of longer texts; null: that isn't asked
    routes: Routing | None = None  # how far runs kept the routes of what they began from; null: that isn't asked
    logged: Logged | None = None  # what is told of the runs beside their loss; null: nothing
    files: list[str] = field(default_factory=list)  # that configs name as data: hashed with them

    @property
    def seed_list(self) -> list[int]:
        return whole_numbers(self.seeds, "seeds") if isinstance(self.seeds, str) else list(self.seeds)

    @property
    def looks(self) -> tuple[int, ...]:
        return tuple(self.protocol.looks) or (len(self.seed_list),)

    def check(self) -> None:
        """Raise ConfigError naming the key, for whatever can be seen without building a run."""
        _check_variants(self)
        _check_seeds(self)
        _check_protocol(self.protocol)
        _check_steps(self)
        missing = [word for word in WORDS if word not in self.decision]
        if missing or set(self.decision) - set(WORDS):
            wrong = next(iter(set(self.decision) - set(WORDS)), None)
            told = f"'{wrong}' is no verdict{near(wrong, WORDS)}" if wrong else f"says nothing of {', '.join(missing)};"
            raise ConfigError(
                f"decision: {told} Write what is concluded from each of {', '.join(WORDS)}, before the first run"
            )
        if self.match is not None and self.match not in MEASURES:
            raise ConfigError(f"match: no '{self.match}'{near(self.match, MEASURES)} Known: {', '.join(MEASURES)}")
        if self.lengths is not None:
            self.lengths.check()
        if self.routes is not None:
            self.routes.check({step.name: step.trains for step in self.prepare})
        if self.logged is not None:
            self.logged.check()
        runs = len(self.variants) * len(self.seed_list)
        if self.budget.runs is not None and runs > self.budget.runs:
            raise ConfigError(f"budget.runs: {self.budget.runs}; variants times seeds are {runs}: declare fewer seeds")


# The keys that every hash of a declaration has seen, also at their defaults; what a part has beside them came later.
ALWAYS_SAID: dict[type, str] = {
    ExperimentConfig: "question configs variants baseline seeds prepare match budget protocol decision",
    Step: "name train upcycle source",
    Budget: "minutes runs tokens",
    Protocol: "axis error practical looks spending give_up",
    Reaching: "question moments ways baseline at tokens passkey decision",
    Routing: "against tokens",
    Logged: "names first last",
}


@dataclass(frozen=True)
class Declaration:
    """An experiment.yaml that was read."""

    name: str
    path: Path
    config: ExperimentConfig
    hash: str

    def tree(self) -> dict[str, Any]:
        return dict(said(self.config))

    def meaning(self, words: Sequence[str]) -> list[Any]:
        """What files and overrides say, wherever they lie."""
        return [
            word
            if is_override(word)
            else [settle(layer.tree) for layer in file_layers(find_near(word, self.path.parent))]
            for word in words
        ]

    def arguments(self, words: Sequence[str]) -> list[str]:
        """Files by their paths, overrides as they are."""
        return [word if is_override(word) else str(find_near(word, self.path.parent)) for word in words]


def read_declaration(name: str | Path) -> Declaration:
    """Of a folder, a file, or a shipped experiment, with or without `configs/experiments/` before its name.

    Raises ConfigError naming file and key.
    """
    path = _find(name)
    config = load_config([str(path)], ExperimentConfig).config
    folder = path.parent
    named = [*config.configs, *(word for words in config.variants.values() for word in words)]
    named += [word for step in config.prepare for word in step.words]
    files = {word: find_near(word, folder) for word in named if not is_override(word)}
    texts = {word: [settle(layer.tree) for layer in file_layers(file)] for word, file in sorted(files.items())}
    hashed: dict[str, Any] = {"declared": said(config), "files": texts}
    if config.files:
        hashed["data"] = {name: hashlib.sha256(_bytes_of(folder / name, name)).hexdigest() for name in config.files}
    label = folder.resolve().name if path.name == FILE else path.stem
    return Declaration(label, path, config, digest(hashed))


def _bytes_of(path: Path, name: str) -> bytes:
    return read_bytes(path, Reading(ConfigError, f"'files' names it ({name}): put it beside the declaration"))


def said(part: Any) -> Any:
    """Plain data of a part of a declaration, as it is hashed.

    Without what is not asked for: a key that came later changes no hash of a declaration that does not use it.
    """
    if isinstance(part, list):
        return [said(one) for one in part]
    if type(part) not in ALWAYS_SAID:
        return part
    values = {field: getattr(part, field.name) for field in fields(part)}
    always = ALWAYS_SAID[type(part)].split()
    return {
        field.name: said(value) for field, value in values.items() if field.name in always or value != default_of(field)
    }


def find_near(word: str, folder: Path) -> Path:
    """A config file beside the declaration, else as the command line finds one."""
    try:
        return find_config(word, near=folder)
    except ConfigError:
        return find_config(word)


def _find(name: str | Path) -> Path:
    asked = user_path(name, "experiment")
    shipped = config_folder() / "experiments" / str(asked).removeprefix("configs/experiments/")
    for place in (asked, asked / FILE, shipped / FILE):
        if place.is_file():
            return place
    known = sorted(path.parent.name for path in (config_folder() / "experiments").glob(f"*/{FILE}"))
    raise ConfigError(
        f"{name}: no such experiment; give a folder that holds {FILE}, or a shipped one: {', '.join(known) or 'none'}"
    )


def _check_variants(config: ExperimentConfig) -> None:
    if len(config.variants) < 2:
        raise ConfigError(f"variants: {len(config.variants)}; a comparison takes two or more")
    for name, words in config.variants.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"variants.{name}: a name is of letters, digits, . + - and single _ between them")
        _check_words(f"variants.{name}", words)
    if config.baseline not in config.variants:
        hint = near(config.baseline, config.variants)
        raise ConfigError(f"baseline: no variant '{config.baseline}'{hint} They are: {', '.join(config.variants)}")
    _check_words("configs", config.configs)


def _check_words(where: str, words: Sequence[str]) -> None:
    for word in words:
        key = word.partition("=")[0].strip()
        if not is_override(word):
            continue
        if key in (*OURS, "declaration"):
            raise ConfigError(f"{where}: {key} is what an experiment sets for each of its runs; leave it out")
        if key in ("seed", "data.order_seed"):
            raise ConfigError(f"{where}: {key} follows from `seeds`, so that variants are paired; leave it out")
        override_layer(word)


def _check_seeds(config: ExperimentConfig) -> None:
    seeds, looks = config.seed_list, config.looks
    if len(set(seeds)) != len(seeds) or min(seeds, default=0) < 0:
        raise ConfigError(f"seeds: {seeds}: whole numbers from 0, each once")
    if len(seeds) < LEAST_PAIRS:
        raise ConfigError(f"seeds: {len(seeds)}; there is no verdict below {LEAST_PAIRS}")
    rising = all(low < high for low, high in pairwise(looks))
    if not rising or looks[0] < LEAST_PAIRS or looks[-1] != len(seeds):
        raise ConfigError(
            f"protocol.looks: {list(looks)}: must be numbers of seeds from {LEAST_PAIRS}, rising, and end with all "
            f"{len(seeds)}"
        )


def _check_protocol(protocol: Protocol) -> None:
    for key, known in (("axis", (END, *AXES)), ("spending", tuple(SPENDING))):
        value = getattr(protocol, key)
        if value not in known:
            raise ConfigError(f"protocol.{key}: no '{value}'{near(value, known)} Known: {', '.join(known)}")
    if not 0 < protocol.error < 0.5:
        raise ConfigError(f"protocol.error: must be between 0 and 0.5, not {protocol.error}; 0.05 is usual")
    if not 0 <= protocol.practical <= 100:
        raise ConfigError(f"protocol.practical: is a percentage of the loss, not {protocol.practical}")


def _check_steps(config: ExperimentConfig) -> None:
    known: dict[str, Step] = {}
    for index, step in enumerate(config.prepare):
        where = f"prepare.{index}"
        if not _NAME.fullmatch(step.name) or step.name in known or step.name in config.variants:
            raise ConfigError(f"{where}.name: '{step.name}' must be a name of its own, of letters, digits, . + - _")
        if sum(getattr(step, kind) is not None for kind in KINDS) != 1:
            raise ConfigError(f"{where}: {step.name} takes one of {', '.join(KINDS)}")
        if step.upcycle is not None and (step.source not in known or known[step.source].train is None):
            trained = [name for name, one in known.items() if one.train is not None]
            raise ConfigError(
                f"{where}.source: names the earlier step whose dense weights are upcycled, one of: "
                f"{', '.join(trained) or 'none yet'}; not '{step.source}'"
            )
        if step.upcycle is None and step.source is not None:
            raise ConfigError(f"{where}.source: is for an upcycling; write train.init_from={REFERENCE}{step.source}")
        _check_words(f"{where}.{step.name}", step.words)
        _check_references(f"{where}.{step.name}", step.words, known)
        known[step.name] = step
    for name, words in config.variants.items():
        _check_references(f"variants.{name}", [*config.configs, *words], known)


def _check_references(where: str, words: Sequence[str], known: dict[str, Step]) -> None:
    for word in words:
        name = reference(word)
        if name is not None and name not in known:
            raise ConfigError(f"{where}: {word} names no step of `prepare`{near(name, known)}")
        if name is not None and word.partition("=")[0].strip() == INIT and known[name].data is not None:
            raise ConfigError(f"{where}: {word} names a corpus, and weights are wanted")


def reference(word: str) -> str | None:
    """The step that an override names as its value, or as the first part of it."""
    _, separator, value = word.partition("=")
    value = value.strip()
    return value[1:].partition("/")[0] if separator and value.startswith(REFERENCE) else None
