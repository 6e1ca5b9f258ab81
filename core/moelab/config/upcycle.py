"""An upcycling run as dataclasses: what `moelab upcycle` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from omegaconf import MISSING

from moelab.config.model import ModelConfig, Part
from moelab.config.scalars import bytes_of
from moelab.errors import ConfigError

PartialModel = Annotated[dict[str, Any], ModelConfig]  # some of its keys


@dataclass
class RecipeConfig:
    """How dense becomes sparse, along axes that compose."""

    experts: Part = field(default_factory=lambda: {"name": "qwen2"})  # where the routed experts' neurons come from
    shared: Part = field(default_factory=lambda: {"name": "copy"})  # where the shared expert's come from
    router: Part = field(default_factory=lambda: {"name": "normal"})  # the router's weights
    scaling: Part = field(default_factory=lambda: {"name": "none"})  # factor on the routed experts' down projections
    silence: float | None = None  # factor on the routed experts' down; 0 makes the start exactly the dense function
    others: str = "mean"  # several sources: everything that is no expert is their mean, or that of the `first`


@dataclass
class ReceiptConfig:
    """On what the result is compared with its source, before any training."""

    tokens: int = 2048  # at least so many: fewer can't tell 0.003 nats from none
    source: Part = field(
        default_factory=lambda: {"name": "embedded", "max_bytes_per_domain": 300_000}
    )  # as data.source; its held-out tenth is read


@dataclass
class UpcycleConfig:
    """All of a `moelab upcycle` run. What `model` does not name comes from the source's config.json."""

    source: str | list[str] = MISSING  # folder of a dense Qwen2 checkpoint, or a list of them to mix
    output: str | None = None  # folder that is made; not needed with --sink hash
    model: PartialModel = field(default_factory=dict)  # of the output, as far as it is not the source's
    # A published model whose proportions give what `model` leaves out, at the source's width: qwen2-57b-a14b. None: no
    # proportions, `model` names all sizes.
    scale: str | None = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    receipt: ReceiptConfig = field(default_factory=ReceiptConfig)
    seed: int = 0  # of what is drawn
    # Kind of the output, as transformers calls it: qwen2_moe, qwen3_moe or mixtral. None: qwen3_moe of a source with
    # norms on q and k, else qwen2_moe.
    target: str | None = None
    dtype: str | None = None  # bfloat16, float16 or float32; None: the source's
    untie: bool = False  # write lm_head although the source ties it: SGLang and llama.cpp read no tied Qwen2-MoE
    workers: int = 2  # processes; the bytes do not depend on it
    max_shard_size: str = "5GB"  # of a file of the output; also 500MB or 2GiB
    plugins: list[str] = field(default_factory=list)  # modules beside the config file, or on the path
    entry_points: bool = True  # False: ignore installed packages' plugins
    store_environment: bool = False  # write into the output what ${oc.env:NAME} stood for; otherwise it is refused

    # The keys that leave no trace in the output, so that ${oc.env:...} may stand there unasked.
    STORED_AS_WRITTEN: ClassVar[frozenset[str]] = frozenset({"source", "output", "workers", "receipt"})

    @property
    def sources(self) -> list[str]:
        """The folders of the dense checkpoints."""
        return list(self.source) if isinstance(self.source, list | tuple) else [self.source]

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` as a number of bytes."""
        found = bytes_of(self.max_shard_size)
        if found is None:
            raise ConfigError(f"max_shard_size: '{self.max_shard_size}' is no size; write 5GB, 500MB or 2GiB")
        return found

    def check(self) -> None:
        """Raise ConfigError for values out of range, naming the key."""
        if not self.sources or not all(self.sources):
            raise ConfigError("source: names no folder; write source=DIR of a dense Qwen2 checkpoint")
        if self.receipt.tokens < 2:
            raise ConfigError(f"receipt.tokens: must be at least 2, not {self.receipt.tokens}")
        if self.seed < 0:
            raise ConfigError(f"seed: must not be negative, not {self.seed}")
        if self.workers < 1:
            raise ConfigError(f"workers: must be at least 1, not {self.workers}")
        if self.shard_bytes < 1:
            raise ConfigError(f"max_shard_size: must be at least 1 byte, not {self.max_shard_size}")
        if self.dtype not in (None, "bfloat16", "float16", "float32"):
            raise ConfigError(f"dtype: must be bfloat16, float16 or float32, not '{self.dtype}'")
        if self.recipe.others not in ("mean", "first"):
            raise ConfigError(f"recipe.others: must be mean or first, not '{self.recipe.others}'")
        if self.recipe.silence is not None and self.recipe.silence < 0:
            raise ConfigError(f"recipe.silence: must not be negative, not {self.recipe.silence}")
