"""A training run as dataclasses: the table of contents of the system."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from omegaconf import MISSING

from moelab.components import came_later
from moelab.config.adapters import KEY as ADAPTERS
from moelab.config.adapters import AdapterConfig, check_adapters
from moelab.config.alignment import AlignmentConfig, check_alignment
from moelab.config.model import ModelConfig, Part
from moelab.config.scalars import bytes_of
from moelab.config.stages import StageConfig, check_stages, fill_in, in_stage, stand_in
from moelab.errors import ConfigError
from moelab.paths import Places, user_path

PACKINGS = ("stream", "concat", "best_fit")  # data/packing.py has each
NARROW = ("float32", "bfloat16")  # in which numbers may be kept from step to step
MOST_THREADS = 1024  # torch dies of a number that the machine can't start


@dataclass
class DataConfig:
    """What is read, and in which pieces."""

    source: Part = field(default_factory=lambda: {"name": "embedded"})  # where the text comes from
    mixer: Part | None = None  # shares of the domains in the training tokens; null: as much of each as there is
    tokenizer: str = "bytes"  # "bytes", or the path of a tokenizer.json
    validation_fraction: float = 0.1  # of the documents: those whose text hashes below it are held out
    seed: int = 0  # of the choice of text, where a source chooses (embedded: which files)
    split_seed: int = 0  # of the split into training and held-out text; keep it between runs that share weights
    # How training documents fill sequences: stream, windows of one text of all; concat, end to end in a new order each
    # epoch; best_fit, each whole where it fits, the rest padded.
    packing: str = "stream"
    # Attention and positions stay within a document, in training and on held-out text; its first token is no target.
    document_mask: bool = False
    order_seed: int | None = None  # of the order of reading; null: `seed`, so that seeds differ in order too


@dataclass
class TrainConfig:
    """How long, in what batches, and how often to look."""

    steps: int = MISSING  # optimizer steps
    batch_size: int = 16  # sequences in an optimizer step
    micro_batch_size: int | None = None  # sequences in a forward pass; None: the whole batch, or memory_budget's choice
    sequence_length: int = 256  # tokens
    dtype: str = "float32"  # of the matmuls: float32 or bfloat16; parameters and optimizer stay float32 unless they say
    # Of matrices, routers' left out, and of their gradients: float32, or, with dtype=bfloat16, bfloat16, rounded at
    # random after each step. For one process.
    parameters_dtype: str = "float32"
    device: str = "auto"  # auto: cuda when there is one, else cpu
    threads: int | None = None  # CPU threads; None: one a core. Another number gives other bits
    activation_checkpointing: int = 0  # every n-th layer keeps its input only and is computed twice; 0: none
    # The loss computes its logits twice, piece by piece, and keeps none; null: beyond 2^27 of them, or memory_budget's
    # choice.
    recompute_logits: bool | None = None
    # torch.compile on parts of the layers, by moelab.training.compiled; of little use on a CPU. For one process.
    compile: bool = False
    # Ways to compute products, attention and experts are measured on the first batch, where this machine doesn't know
    # them yet; false: constants choose; null: measured where a CPU's run is long and has no memory_budget. One process.
    autotune: bool | None = field(default=None, metadata=came_later(None))
    # Of a process, "8 GB": micro_batch_size, activation_checkpointing and recompute_logits, where they are not said,
    # are the cheapest that fit by `moelab plan`'s figures. null: nothing is chosen.
    memory_budget: str | None = None
    grad_clip: float = 1.0  # global norm; 0: off
    log_every: int = 10  # steps
    gradient_shares_every: int = 50  # steps, of those that are logged; a backward pass for each loss. 0: never
    probe_every: int = 50  # steps, of those that are logged, beside the first and the last; see on_probe. 0: never
    # Steps; 0: only at the end; null: every 15 minutes, or less often, so that saving takes at most 1 % of the time. A
    # run that is stopped, or fails with its state whole, saves too.
    save_every: int | None = None
    # Checkpoints are copied to memory and written while the run goes on: a longer save for a shorter halt, and as much
    # memory again as weights and moments take on a process. null: where several processes share the run.
    save_in_background: bool | None = None
    keep_checkpoints: int = 2  # the newest ones; 0: all
    keep_best: bool = False  # beside them, in run_dir/best, the one of the lowest held-out loss (evaluation.every)
    patience: int | None = None  # evaluations in a row without a lower held-out loss that end the run; null: none do
    init_from: str | None = None  # a checkpoint (Hugging Face or moelab) to start from; None: random
    # Keys under which the config means another model or tokenizer than the checkpoint's: [model.moe.router, ...]; a key
    # covers what lies beneath it. Any other difference is refused.
    init_overrides: list[str] = field(default_factory=list)
    # Parameters that stay as they are, by patterns over their names: ["*.router.*"], ["embed_tokens.*", "layers.0.*"].
    freeze: list[str] = field(default_factory=list)
    # LoRA: matrices that learn through a product of low rank, while nothing else does, from train.init_from:
    # [{target: "layers.*.mlp.experts.*", r: 8, alpha: 16}]. Of several that match a name the last counts. One process.
    adapters: list[AdapterConfig] = field(default_factory=list)


@dataclass
class OptimizerConfig:
    """What makes a step of gradients. Matrices decay; biases and norms don't.

    AdamW's own keys (Loshchilov & Hutter 2019) hold for whatever the algorithm leaves to AdamW.
    """

    # What computes a step; the keys beside it mean the same to all.
    algorithm: Part = field(default_factory=lambda: {"name": "adamw"}, metadata=came_later({"name": "adamw"}))
    lr: float = 1e-3  # the highest learning rate; `schedule` says when
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW's: decay of the first and the second moment
    eps: float = 1e-8  # AdamW's: added to the root of the second moment
    weight_decay: float = 0.1  # decoupled, times the learning rate; of matrices alone
    moments_dtype: str = "float32"  # of what is kept of gradients: float32, or bfloat16, rounded. For one process
    # Factors on the learning rate by patterns over names of parameters, {"embed_tokens.*": 0.1}: of several
    # that match a name the last one counts. Decay goes along, since it is times the rate.
    learning_rates: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ConfigError for values out of range, naming the key."""
        for key in ("lr", "eps"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"optimizer.{key}: must be positive, not {getattr(self, key)}")
        _at_least("optimizer", self, "weight_decay", 0)
        for pattern, factor in self.learning_rates.items():
            if factor <= 0:
                raise ConfigError(
                    f"optimizer.learning_rates: the factor of '{pattern}' must be positive, not {factor}; train.freeze "
                    "leaves parameters as they are"
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas: must be two numbers in 0 .. 1, not {self.betas}")
        if self.moments_dtype not in NARROW:
            raise ConfigError(f"optimizer.moments_dtype: must be float32 or bfloat16, not '{self.moments_dtype}'")


@dataclass
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then `cosine` or `wsd` (warm-up, stable, decay) or `constant`."""

    name: str = "cosine"  # cosine, wsd or constant
    warmup_steps: int = 0  # in which the rate rises linearly
    min_lr_ratio: float = 0.1  # of optimizer.lr, at the end
    decay_fraction: float = 0.2  # wsd: the last part of the steps, in which the rate falls linearly
    # Where a run is resumed with more train.steps than its rate was planned for: steps over which it rises again from
    # where it is to optimizer.lr, before the schedule runs over those left. null: that is refused, as another recipe.
    rewarm_steps: int | None = None


@dataclass
class EvaluationConfig:
    """Held-out loss and samples, before the first step and at the end, and in between."""

    every: int = 0  # steps; 0: only before the first and at the end
    sequences: int = 64  # of train.sequence_length tokens
    domains: list[str] | None = None  # that are scored, patterns such as */yes too; null: all
    batch_size: int | None = None  # sequences at once; None: as many as are not slower, at least a micro-batch
    prompts: list[str] = field(default_factory=lambda: ["def ", "The "])  # that samples continue
    sample_tokens: int = 64  # 0: no samples
    temperature: float = 0.8  # of the samples; 0: always the likeliest token


@dataclass
class ParallelConfig:
    """How a run is laid over processes, whose number is torchrun's: replicate x shard of them."""

    replicate: int = 1  # groups of processes that hold the same
    shard: int = 1  # processes that share out parameters, gradients and optimizer state (FSDP2)
    expert: int = 1  # of these, processes that share out whole experts
    timeout: float = 600.0  # seconds that one waits for another before the run ends
    # Over a step's micro-batches of one process gradients add up `whole`, to be reduced once, or in `pieces`: a shard's
    # memory, and a reduction for each.
    accumulate: str = "whole"
    # FSDP2's key: a gathered layer is cut again after its forward pass, and gathered anew for the backward one. False:
    # it stays whole until the step's last backward pass: memory of the whole model, and one gather a step.
    reshard_after_forward: bool = True

    @property
    def world(self) -> int:
        """Processes."""
        return self.replicate * self.shard

    def check(self) -> None:
        """Raise ConfigError for what can't be, naming the key."""
        for key in ("replicate", "shard", "expert"):
            _at_least("parallel", self, key, 1)
        if self.shard % self.expert:
            raise ConfigError(
                f"parallel.expert: {self.expert} does not divide parallel.shard {self.shard}, of which it is a part"
            )
        if self.accumulate not in ("whole", "pieces"):
            raise ConfigError(f"parallel.accumulate: must be whole or pieces, not '{self.accumulate}'")
        if self.timeout <= 0:
            raise ConfigError(f"parallel.timeout: must be positive, not {self.timeout}")


@dataclass
class RunConfig:
    """All of a `moelab train` run."""

    run_dir: str = MISSING  # the folder that is made
    name: str | None = None  # as the comparison calls it; None: the folder's name
    seed: int = 0  # of the initialisation and of all noise
    plugins: list[str] = field(default_factory=list)  # modules beside the config file, or on the path
    entry_points: bool = True  # False: ignore installed packages' plugins
    search_path: list[str] = field(default_factory=list)  # of plugins and data; the configs' folders and . are added
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    # Parts of the run one after the other, [{name, steps, and what is otherwise}]: sequence_length, batch_size,
    # micro_batch_size, rope_theta, rope_scaling, max_position_embeddings, mixer, lr; else the run's own.
    stages: list[StageConfig] = field(default_factory=list, metadata=came_later([]))
    # Post-training (`moelab align`), stages one after the other: [{stage: sft, data: chats.jsonl}, {stage: dpo, ...}].
    alignment: list[AlignmentConfig] = field(default_factory=list)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    # What watches and records the run.
    observers: list[Part] = field(default_factory=lambda: [{"name": "tensorboard"}, {"name": "recorder"}])
    resume: bool = False  # go on from the newest checkpoint in run_dir
    declaration: str | None = None  # hash of the experiment.yaml that this run was made for (moelab experiment)
    store_environment: bool = False  # write into the run folder what ${oc.env:NAME} stood for, not the expression

    # The keys whose ${oc.env:...} is stored as it was written; what is not here, a checkpoint needs to be opened.
    STORED_AS_WRITTEN: ClassVar[frozenset[str]] = frozenset(
        {
            "run_dir", "name", "seed", "data", "train", "optimizer", "schedule", "evaluation", "observers", "resume",
            "parallel", "alignment",
        }
    )  # fmt: skip

    SEARCHED: ClassVar[tuple[str, ...]] = ("plugins", "data", "alignment")  # what names modules and files

    def __post_init__(self) -> None:
        self.as_written: dict[tuple[str, ...], str] = {}  # key path -> the expression that is stored there
        self.said_in: dict[str, dict[str, Path]] = {}  # section -> text in it -> the folder of the file that says it

    def places(self, section: str) -> Places:
        """Where what `section` names is looked for."""
        search = tuple(user_path(folder, "search_path") for folder in self.search_path)
        return Places(self.said_in.get(section, {}), search)

    @property
    def order_seed(self) -> int:
        """What decides the order of reading."""
        return self.seed if self.data.order_seed is None else self.data.order_seed

    def check(self) -> None:
        """Raise ConfigError for values out of range, naming the key.

        Of a run in stages, the values of the last one come to stand: what it makes is that.
        """
        if self.stages:
            self._check_in_stages()
        if not self.run_dir:
            raise ConfigError("run_dir: names no folder; write run_dir=runs/NAME")
        _at_least_of("seed", self.seed, 0)
        _at_least("data", self.data, "seed", 0)
        if self.data.packing not in PACKINGS:
            raise ConfigError(f"data.packing: must be one of {', '.join(PACKINGS)}, not '{self.data.packing}'")
        _check_train(self.train)
        _check_schedule(self.schedule)
        self.optimizer.check()
        _check_parallel(self.parallel, self.train)
        if not 0 < self.data.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction: must be between 0 and 1, not {self.data.validation_fraction}")
        if self.train.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"train.sequence_length: {self.train.sequence_length} exceeds model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )
        for key in ("every", "sample_tokens"):
            _at_least("evaluation", self.evaluation, key, 0)
        _at_least("evaluation", self.evaluation, "sequences", 1)
        if self.evaluation.batch_size is not None:
            _at_least("evaluation", self.evaluation, "batch_size", 1)
        _at_least("evaluation", self.evaluation, "temperature", 0)
        for key, asked in (("keep_best", self.train.keep_best), ("patience", self.train.patience is not None)):
            if asked and not self.evaluation.every:
                raise ConfigError(
                    f"train.{key}: looks at evaluations, and there is one, at the end: set evaluation.every"
                )
        self._check_narrow()
        self._check_adapters()
        check_alignment(self)
        self.model.check()

    def _check_in_stages(self) -> None:
        check_stages(self)
        fill_in(self)
        for number, stage in enumerate(self.stages):
            config = in_stage(self, number)
            config.stages = []
            try:
                config.check()
            except ConfigError as error:
                raise ConfigError(f"stages.{number}: in stage '{stage.name}', {error}") from error
        stand_in(self, -1)

    def _check_narrow(self) -> None:
        """Numbers of 16 bits that are kept from step to step."""
        kept, moments, products = self.train.parameters_dtype, self.optimizer.moments_dtype, self.train.dtype
        if self.train.compile and self.parallel.world > 1:
            raise ConfigError(f"train.compile: is for one process, and parallel asks for {self.parallel.world}")
        if self.train.autotune and self.parallel.world > 1:
            raise ConfigError(f"train.autotune: is for one process, and parallel asks for {self.parallel.world}")
        for key, dtype in {"train.parameters_dtype": kept, "optimizer.moments_dtype": moments}.items():
            if dtype not in NARROW:
                raise ConfigError(f"{key}: must be float32 or bfloat16, not '{dtype}'")
            if dtype != "float32" and self.parallel.world > 1:
                raise ConfigError(f"{key}: {dtype} is for one process; write float32, or shard over more processes")
        if kept == "bfloat16" != products:
            raise ConfigError(
                f"train.parameters_dtype: {kept} needs train.dtype={kept}, not {products}: products can't be finer "
                "than what they multiply"
            )

    def _check_adapters(self) -> None:
        check_adapters(self.train.adapters)
        if not self.train.adapters:
            return
        if self.train.init_from is None:
            raise ConfigError(f"{ADAPTERS}: adapt the weights of a checkpoint, and no train.init_from names one")
        if self.train.freeze:
            raise ConfigError(
                f"train.freeze: says nothing beside {ADAPTERS}, under which every parameter stays as it is and the "
                "adapters alone learn; leave one of them out"
            )
        if self.parallel.world > 1:
            raise ConfigError(
                f"{ADAPTERS}: is for one process, and parallel asks for {self.parallel.world}; leave one of them out"
            )
        if self.train.parameters_dtype != "float32":
            raise ConfigError(
                f"{ADAPTERS}: adds to parameters of fp32; write train.parameters_dtype=float32, whose matmuls may be "
                "bfloat16 all the same (train.dtype)"
            )


def _check_train(train: TrainConfig) -> None:
    for key in ("steps", "batch_size", "sequence_length", "log_every"):
        _at_least("train", train, key, 1)
    if train.save_every is not None:
        _at_least("train", train, "save_every", 0)
    if train.patience is not None:
        _at_least("train", train, "patience", 1)
    for key in ("grad_clip", "keep_checkpoints", "gradient_shares_every", "probe_every", "activation_checkpointing"):
        _at_least("train", train, key, 0)
    for key in train.init_overrides:
        if key != "data.tokenizer" and key.split(".")[0] != "model":
            raise ConfigError(f"train.init_overrides: '{key}' is no key of the model, and not data.tokenizer")
    micro = train.micro_batch_size
    if micro is not None and (micro < 1 or train.batch_size % micro):
        raise ConfigError(f"train.micro_batch_size: {micro} does not divide train.batch_size {train.batch_size}")
    if train.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"train.dtype: must be float32 or bfloat16, not '{train.dtype}'")
    if train.memory_budget is not None and not bytes_of(train.memory_budget):
        raise ConfigError(f"train.memory_budget: '{train.memory_budget}' is no size; write 8 GB, 500 MB or 6 GiB")
    if train.threads is not None and train.threads < 1:
        raise ConfigError(f"train.threads: must be at least 1, not {train.threads}")
    if train.threads is not None and train.threads > MOST_THREADS:
        raise ConfigError(f"train.threads: must be at most {MOST_THREADS}, not {train.threads}")


def _check_schedule(schedule: ScheduleConfig) -> None:
    if schedule.name not in ("cosine", "wsd", "constant"):
        raise ConfigError(f"schedule.name: must be cosine, wsd or constant, not '{schedule.name}'")
    _at_least("schedule", schedule, "warmup_steps", 0)
    if schedule.rewarm_steps is not None:
        _at_least("schedule", schedule, "rewarm_steps", 0)
    for key in ("min_lr_ratio", "decay_fraction"):
        if not 0 <= getattr(schedule, key) <= 1:
            raise ConfigError(f"schedule.{key}: must be in 0 .. 1, not {getattr(schedule, key)}")


def _check_parallel(parallel: ParallelConfig, train: TrainConfig) -> None:
    parallel.check()
    micro = train.micro_batch_size or max(train.batch_size // parallel.world, 1)
    if train.batch_size % (micro * parallel.world):
        raise ConfigError(
            f"train.batch_size: {train.batch_size} sequences don't divide into micro-batches of {micro} for each of "
            f"{parallel.world} processes; make it a multiple of {micro * parallel.world}"
        )


def _at_least(section: str, holder: object, key: str, bound: int) -> None:
    _at_least_of(f"{section}.{key}", getattr(holder, key), bound)


def _at_least_of(where: str, value: float, bound: int) -> None:
    if value < bound:
        raise ConfigError(f"{where}: must be at least {bound}, not {value}")
