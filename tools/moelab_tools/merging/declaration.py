"""What `moelab merge` is told: which checkpoints, how they are merged, and where the result lies."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from moelab.errors import ConfigError

LINEAR, TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES = "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"
METHODS = (LINEAR, TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES)
L1, DENSITY, NONE = "l1", "density", "none"


@dataclass
class MergedModel:
    """One of the checkpoints."""

    path: str  # a run folder, a moelab checkpoint or a Hugging Face folder
    weight: float = 1.0  # of its numbers (linear), or of what it changed of the base
    density: float = 1.0  # ties, dare: the share of what it changed, of each matrix, that is kept
    # Weights of single parameters by patterns over their names, {"*.router.*": 0}; of several that match the last one.
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class MergeConfig:
    """All of a `moelab merge`."""

    models: list[MergedModel] = field(default_factory=list)  # two or more of one architecture and tokenizer
    base: str | None = None  # what they were trained from; all methods but linear
    # linear: a mean. task_arithmetic: base + the weighted sum of what each changed. ties: of that the largest, by the
    # sign of the sum. dare_linear and dare_ties: a random part of it.
    method: str = LINEAR
    normalize: bool | None = None  # divide by the sum of the weights; null: linear and ties do
    scale: float = 1.0  # on what is added to the base (mergekit's lambda)
    # What dare does to the part it keeps: l1, as large a sum of magnitudes as before (mergekit); density, divided by
    # the share (the paper); none.
    rescale: str = L1
    align_experts: bool = False  # put each model's experts in the order of the base's (or the first model's)
    dtype: str | None = None  # of what is written: float32, bfloat16, float16; null: as the first folder has it
    max_shard_size: str = "5GB"
    seed: int = 0  # of dare's masks
    output: str = MISSING  # the Hugging Face folder that is made
    plugins: list[str] = field(default_factory=list)  # modules beside the config file, or on the path
    entry_points: bool = True  # False: ignore installed packages' plugins

    @property
    def normalizes(self) -> bool:
        return self.method in (LINEAR, TIES) if self.normalize is None else self.normalize

    @property
    def sparse(self) -> bool:
        """Whether a part of what each model changed is left out."""
        return self.method in (TIES, DARE_LINEAR, DARE_TIES)

    @property
    def folders(self) -> list[tuple[str, str]]:
        """(key, folder), the one whose experts' order and files the others follow first."""
        own = [] if self.base is None else [("base", self.base)]
        return own + [(f"models.{number}.path", model.path) for number, model in enumerate(self.models)]

    def check(self) -> None:
        """Raise ConfigError naming the key."""
        for key, value, known in (("method", self.method, METHODS), ("rescale", self.rescale, (L1, DENSITY, NONE))):
            if value not in known:
                raise ConfigError(f"{key}: must be one of {', '.join(known)}, not '{value}'")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype: must be float32, bfloat16 or float16, not '{self.dtype}'")
        if (self.method == LINEAR) != (self.base is None):
            cure = "leave it out" if self.base else f"name what the models were trained from, which {self.method} needs"
            raise ConfigError(f"base: {'is nothing to a mean (linear)' if self.base else 'has no value'}; {cure}")
        if len(self.models) < (2 if self.base is None else 1):
            raise ConfigError("models: give two or more, [{path: runs/a}, {path: runs/b}]")
        for number, model in enumerate(self.models):
            if not 0 < model.density <= 1:
                raise ConfigError(f"models.{number}.density: must be above 0 and at most 1, not {model.density}")
            if model.density < 1 and not self.sparse:
                raise ConfigError(
                    f"models.{number}.density: {self.method} keeps all; take ties, dare_linear, dare_ties"
                )
        if self.normalizes and not any(model.weight for model in self.models):
            raise ConfigError("models: every weight is 0, and their sum is divided by; give one another weight")
