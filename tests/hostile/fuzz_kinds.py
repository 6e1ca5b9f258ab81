"""What is damaged, and who then reads it: for each kind of input its files, its readers and its command lines."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz_mutate import some_value, spelled

from moelab import Registry, load
from moelab.alignment.examples import Shaping, read_examples
from moelab.checkpoint import read_state
from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.config.upcycle import UpcycleConfig
from moelab.data.chat import ChatTemplate
from moelab.data.lineage import lineage_of
from moelab.data.seen import read_record
from moelab.data.tokenizer import load_tokenizer
from moelab.hf.carried import carried_files, largest_token_id
from moelab.hf.config import read_config
from moelab.hf.files import TensorFolder, read_header
from moelab.origin import end_token_ids, read_origin, sampling_settings
from moelab.paths import Places
from moelab.routes.files import read_trace
from moelab.run_table.frame import run_records
from moelab.training.setup import build_corpus_of, resolve_run
from moelab_tools.compare.reach import charts_of
from moelab_tools.compare.runs import read_run
from moelab_tools.synthesis.answers import read_answers
from moelab_tools.synthesis.conversations import read_asked
from moelab_tools.synthesis.declaration import CritiqueConfig
from moelab_tools.synthesis.doctests import of_paths, questions
from moelab_tools.synthesis.tags import read_conversations
from moelab_upcycling.convert import prepare, registry_of
from moelab_upcycling.verify import plan_of_output

Reader = Callable[[Path], object]
STEP = "run/checkpoints/step_00000003"
LENGTHS = "run/lengths/step_00000003/lengths.json"
SHORT = ("--tokens", "3")


Arguments = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Files, and who reads them: readers are called in this process, commands run where the copies lie."""

    damaged: tuple[str, ...]  # globs, one of which each mutation takes
    readers: tuple[Reader, ...]
    commands: tuple[Arguments, ...]


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    parts: tuple[str, ...]  # of the world, copied
    groups: tuple[Group, ...]
    arguments: Callable[[Arguments, random.Random], tuple[Arguments, str]] | None = None  # what is damaged instead
    own: bool = False  # the user's: it may name another folder to write to


def _config(*arguments: str) -> Reader:
    def read(folder: Path) -> None:
        loaded = load_config([str(folder / "mine.yaml"), *arguments], RunConfig)
        resolve_run(loaded.config, REGISTRY)

    return read


def _corpus(source: str) -> Reader:
    def read(folder: Path) -> None:
        told = f"data.source={source.replace('@', str(folder))}"
        config = load_config([str(folder / "mine.yaml"), told], RunConfig).config
        resolve_run(config, REGISTRY)
        build_corpus_of(config, REGISTRY, load_tokenizer("bytes"))

    return read


def _encode(folder: Path) -> None:
    for name in ("tok", "dense"):
        if (folder / name).exists():
            tokenizer = load_tokenizer(str(folder / name))
            tokenizer.encode_with_bytes("some text, 12 and <|endoftext|> more")
            tokenizer.decode([0, 5, 10**6])
            tokenizer.files()
            largest_token_id(folder / name)


def _chats(stage: str) -> Reader:
    def read(folder: Path) -> None:
        template = ChatTemplate.from_tokenizer(load_tokenizer("bytes"))
        read_examples(folder / "chats.jsonl", Shaping(stage, template, 64))

    return read


def _answers(folder: Path) -> None:
    read_answers([folder / "said.jsonl"])


def _tagged(folder: Path) -> None:
    read_conversations([folder / "chats.jsonl"])


def _asked(folder: Path) -> None:
    load_config([str(folder / "principles.yaml"), "generator.name=x", "data=[x]", "output=o"], CritiqueConfig)
    read_asked([str(folder / "asked.jsonl")], Places())


def _functions(folder: Path) -> None:
    list(questions(of_paths([folder / "functions.py"])))


def _plan(folder: Path) -> None:
    loaded = load_config([str(folder / "recipe.yaml"), f"source={folder / 'dense'}"], UpcycleConfig)
    prepare(loaded.config, registry_of(loaded.config))


def _verify(folder: Path) -> None:
    plan_of_output(folder / "up", [folder / "dense"])


def _override(arguments: tuple[str, ...], chance: random.Random) -> tuple[tuple[str, ...], str]:
    key = chance.choice(KEYS)
    if chance.random() < 0.1:
        key = chance.choice((key + ".x", key + ".0", key[:-1], "model..x", "", "a" * 400, "\x1b[31m", f'"{key}"'))
    value = spelled(some_value(chance))
    if chance.random() < 0.2:
        value = chance.choice(
            ("[", "{", "{a: ", "[[[", "'", '"\\', "{name: softmax_topk", "[1,,2]", "{a: &x 1, b: *x}")
        )
    word = f"{key}={value}".replace("\0", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    return (*arguments, word), word[:120]


def _option(arguments: tuple[str, ...], chance: random.Random) -> tuple[tuple[str, ...], str]:
    words = list(arguments)
    odd = chance.choice(ODD).replace("\0", "")
    at = chance.randrange(1, len(words) + 1)
    how = chance.choice(("set", "insert", "delete", "option"))
    if how == "set" and at < len(words):
        words[at] = odd
    elif how == "delete" and at < len(words):
        del words[at]
    elif how == "option":
        words += [chance.choice(OPTIONS), odd]
    else:
        words.insert(at, odd)
    return tuple(words), f"{how} {at} {odd[:60]!r}"


REGISTRY = Registry(entry_points=False)
_OPTIONS = """
    --json --tokens --temperature --top-p --seed --tokenizer --dtype --max-shard-size --force --output --baseline
    --practical --measure --vary --match --multiple-of --devices --expert-parallel --device --device-memory --source
    --layers --sink --prompt --resume --checkpointing --full --dry-run --screening --trust-plugins
"""
OPTIONS = _OPTIONS.split()
_PLAIN = """
    -1 0 1e999 nan a/b/c ~nobody9 /dev/zero /dev/null 0:99999999999999999999 1:0 5GB bfloat16 mine.yaml run hf dense
    up . .. tok -- -h name=[/red] run_dir=x[/b] data.source.pattern=/etc/*
    model.moe.layout.num_experts=1099511627776
"""
ODD = [*_PLAIN.split(), "", "9" * 400, "x" * 5000, "\x1b[31m", "x" * 300, "\udcff", "9" * 400 + "GB", "run_dir=\udcff"]
_KEYS = """
    name run_dir seed plugins search_path model model.vocab_size model.hidden_size model.num_hidden_layers
    model.intermediate_size model.num_attention_heads model.head_dim model.rope_theta model.moe model.moe.layout
    model.moe.layout.name model.moe.layout.num_experts model.moe.layout.num_experts_per_tok
    model.moe.layout.moe_intermediate_size model.moe.router model.moe.router.name model.moe.layers
    model.moe.layers.0 model.moe.layers.0.router model.moe.shared_expert model.moe.shared_expert.intermediate_size
    model.moe.backend model.moe.balance_losses model.moe.balance_losses.0 model.moe.balance_losses.0.weight
    model.moe.expert_chunk data data.tokenizer data.source data.source.name data.source.paths data.source.pattern
    data.source.domains data.source.separator data.validation_fraction data.split_seed train train.steps
    train.batch_size train.sequence_length train.dtype train.device train.threads train.init_from
    train.init_overrides train.log_every train.save_every train.grad_clip train.micro_batch_size optimizer
    optimizer.lr optimizer.betas optimizer.betas.1 schedule schedule.name schedule.warmup_steps evaluation
    evaluation.sequences evaluation.batch_size observers observers.0 resume model.moe.router.score
    model.moe.router.capacity_factor model.moe.router.n_group
"""
KEYS = _KEYS.split()
TRAIN = ("train", "mine.yaml")
ALIGN = ("align", "mine.yaml", "train.init_from=run", "alignment=[{stage: sft, data: chats.jsonl, steps: 2}]")
JUDGE = ("synthesise", "said.jsonl", "--reward", "{name: exact_answer, take: last_number}", "--out", "o")
REPURPOSE = ("repurpose", "functions.py", "--out", "q.jsonl")
ASKING = ("data=[asked.jsonl]", "output=o", "generator={name: checkpoint, path: hf, max_new_tokens: 3}")
CRITIQUE, EVOLVE = ("critique", "principles.yaml", *ASKING), ("evolve", *ASKING)
TAG = ("tag", "data=[chats.jsonl]", "output=o", "generator={name: checkpoint, path: run, max_new_tokens: 3}")
MERGE = ("merge", "models=[{path: hf}, {path: hf}]", "output=o", "entry_points=false")
RESUME = (*TRAIN, "run_dir=run", "--resume")
CURATE = ("stages=[{name: normalise}, {name: repetition}]", "output=o", "workers=1", "entry_points=false")
CONFIGURED = (("explain", "mine.yaml"), TRAIN, ("plan", "mine.yaml"))


def _corpora(*sources: str) -> Group:
    files = tuple(source.partition("@/")[2].partition("]")[0].partition(",")[0].rstrip("}") for source in sources)
    relative = [source.replace("@/", "") for source in sources]
    commands = tuple((*TRAIN, f"data.source={source}") for source in relative)
    curated = tuple(("data", f"sources=[{source}]", *CURATE) for source in relative)
    return Group(files, tuple(map(_corpus, sources)), commands + curated)


KINDS: dict[str, Kind] = {
    "config": Kind(("mine.yaml", "text"), (Group(("mine.yaml",), (_config(),), CONFIGURED),), own=True),
    "chats": Kind(
        ("mine.yaml", "run", "text", "chats.jsonl"),
        (Group(("chats.jsonl",), (*map(_chats, ("sft", "reward", "dpo", "online_dpo")), _tagged), (ALIGN, TAG)),),
    ),
    "answers": Kind(("said.jsonl",), (Group(("said.jsonl",), (_answers,), (JUDGE,)),)),
    "asked": Kind(
        ("asked.jsonl", "principles.yaml", "hf"),
        (Group(("asked.jsonl", "principles.yaml"), (_asked,), (CRITIQUE, EVOLVE)),),
    ),
    "functions": Kind(("functions.py",), (Group(("functions.py",), (_functions,), (REPURPOSE,)),)),
    "override": Kind(("mine.yaml", "text", "hf", "tok"), (Group((), (), CONFIGURED),), _override, own=True),
    "safetensors": Kind(
        ("mine.yaml", "text", "hf", "run"),
        (
            Group(
                ("hf/model.safetensors",),
                (lambda f: load(f / "hf"),),
                (("generate", "hf", *SHORT), (*TRAIN, "train.init_from=hf"), ("export", "hf", "o"), MERGE),
            ),
            Group(
                (f"{STEP}/model.safetensors",),
                (lambda f: load(f / "run"),),
                (("generate", "run", *SHORT), RESUME, ("export", "run", "o"), ("evaluate", "run")),
            ),
            Group(
                (f"{STEP}/training.safetensors",),
                (lambda f: read_header(f / STEP / "training.safetensors"),),
                (RESUME, ("surgery", "run", "o", "top_k", "num_experts_per_tok=1", "--no-receipt")),
            ),
        ),
    ),
    "index": Kind(
        ("dense", "recipe.yaml"),
        (
            Group(
                ("dense/model.safetensors.index.json", "dense/*.safetensors"),
                (lambda f: TensorFolder(f / "dense"), lambda f: load(f / "dense"), _plan),
                (
                    ("generate", "dense", *SHORT),
                    ("upcycle", "recipe.yaml", "--sink", "hash"),
                    ("export", "dense", "o"),
                ),
            ),
        ),
    ),
    "config_json": Kind(
        ("mine.yaml", "text", "recipe.yaml", "hf", "dense"),
        (
            Group(
                ("hf/config.json",),
                (lambda f: read_config(f / "hf"), lambda f: load(f / "hf"), lambda f: end_token_ids(f / "hf")),
                (
                    ("generate", "hf", *SHORT),
                    (*TRAIN, "train.init_from=hf"),
                    ("explain", "hf"),
                    ("coefficient", "0.01", "--model", "hf"),
                    ("evaluate", "hf", "mine.yaml"),
                    ("plan", "hf"),
                ),
            ),
            Group(
                ("hf/generation_config.json",),
                (lambda f: end_token_ids(f / "hf"), lambda f: sampling_settings(f / "hf")),
                (("generate", "hf", *SHORT), ("chat", "hf")),
            ),
            Group(
                ("dense/config.json",),
                (_plan, lambda f: load(f / "dense")),
                (("upcycle", "recipe.yaml", "output=o"), ("export", "dense", "o")),
            ),
        ),
    ),
    "tokenizer": Kind(
        ("mine.yaml", "text", "dense", "tok", "recipe.yaml"),
        (
            Group(
                ("dense/tokenizer.json", "dense/tokenizer.json", "dense/tokenizer_config.json"),
                (_encode, lambda f: read_origin(f / "dense"), lambda f: carried_files(f / "dense")),
                (("generate", "dense", *SHORT), ("export", "dense", "o"), ("upcycle", "recipe.yaml", "output=o")),
            ),
            Group(
                ("tok/tokenizer.json", "tok/tokenizer.json", "tok/tokenizer_config.json"),
                (_encode,),
                (
                    (*TRAIN, "data.tokenizer=tok", "model.vocab_size=400"),
                    ("generate", "dense", "--tokenizer", "tok", *SHORT),
                ),
            ),
        ),
    ),
    "data": Kind(
        (
            "mine.yaml",
            "text",
            "docs.jsonl",
            "docs.jsonl.gz",
            "ids.npy",
            "ids.bin",
            "meg.bin",
            "meg.idx",
            "tok.ds",
            "tok.ds.index",
        ),
        (
            _corpora("{name: jsonl, paths: [@/docs.jsonl]}"),
            _corpora("{name: jsonl, paths: [@/docs.jsonl.gz], domain_key: domain}"),
            _corpora("{name: jsonl, paths: [@/docs.jsonl], skip_bad: true, messages_key: messages}"),
            _corpora("{name: tokens, train: @/ids.npy}"),
            Group(
                ("meg.idx", "meg.bin"),
                (_corpus("{name: tokens, train: @/meg.bin}"),),
                ((*TRAIN, "data.source={name: tokens, train: meg.bin}"),),
            ),
            Group(
                ("tok.ds.index",),
                (_corpus("{name: tokens, domains: {a: [@/tok.ds]}}"),),
                ((*TRAIN, "data.source={name: tokens, domains: {a: [tok.ds]}}"),),
            ),
            _corpora("{name: tokens, train: @/ids.bin, dtype: uint16}"),
            Group(("text/1.txt",), (_corpus("{name: text, paths: [@/text]}"),), (TRAIN,)),
        ),
    ),
    "runfolder": Kind(
        ("mine.yaml", "text", "run", "run2"),
        (
            Group(
                ("run/config.yaml", "run/summary.json", "run/metrics.jsonl", "run/evaluation_documents.jsonl"),
                (lambda f: read_run(f / "run"), run_records),
                (
                    ("compare", "run", "run2", "--output", "o"),
                    RESUME,
                    ("compare", "run", "run2", "--json", "o.json"),
                    ("runs", ".", "--sort", "loss", "--where", "state=*"),
                    ("runs", ".", "--json"),
                ),
            ),
            Group(
                (LENGTHS,),
                (lambda f: charts_of(f / "run"),),
                (("compare", "run", "run2", "--output", "o"), ("evaluate", "run", "--length", "2x", "--tokens", "64")),
            ),
            Group(
                (f"{STEP}/config.yaml",),
                (lambda f: load(f / "run"), lambda f: read_origin(f / "run")),
                (
                    ("generate", "run", *SHORT),
                    ("evaluate", "run"),
                    ("explain", "run"),
                    ("export", "run", "o"),
                    (*TRAIN, "train.init_from=run"),
                    ("explain", f"{STEP}/config.yaml"),
                    ("config", "run", "--resolved"),
                    RESUME,
                ),
            ),
            Group((f"{STEP}/state.json",), (lambda f: read_state(f / STEP),), (RESUME,)),
            Group(
                (f"{STEP}/moelab_*.json", f"{STEP}/tokenizer*.json"),
                (
                    lambda f: read_record(f / STEP),
                    lambda f: lineage_of(f / STEP, "x"),
                    lambda f: read_origin(f / "run"),
                ),
                (("export", "run", "o"), (*TRAIN, "train.init_from=run"), RESUME),
            ),
        ),
    ),
    "gguf": Kind(  # where the package that reads it is not installed, each is refused by that name
        ("mine.yaml", "text", "dense.gguf"),
        (
            Group(
                ("dense.gguf",),
                (
                    lambda f: read_config(f / "dense.gguf"),
                    lambda f: load(f / "dense.gguf"),
                    lambda f: carried_files(f / "dense.gguf"),
                ),
                (
                    ("generate", "dense.gguf", *SHORT),
                    ("export", "dense.gguf", "o"),
                    ("explain", "dense.gguf"),
                    ("upcycle", "dense.gguf", "o", "workers=1", "--no-receipt"),
                    (*TRAIN, "train.init_from=dense.gguf"),
                ),
            ),
        ),
    ),
    "trace": Kind(
        ("mine.yaml", "text", "run", "trace"),
        (
            Group(
                ("trace/trace.json", "trace/routes.safetensors"),
                (lambda f: read_trace(f / "trace"),),
                (
                    ("view", "trace", "--out", "o.html"),
                    ("agreement", "trace", "trace"),
                    ("replay", "run", "trace"),
                ),
            ),
        ),
    ),
    "recipe": Kind(
        ("dense", "up", "recipe.yaml"),
        (
            Group(("recipe.yaml",), (_plan,), (("upcycle", "recipe.yaml"), ("upcycle", "recipe.yaml", "--dry-run"))),
            Group(
                ("up/upcycle.json", "up/upcycle.json", "up/upcycle_manifest.jsonl", "up/*.json", "up/*.safetensors"),
                (_verify,),
                (
                    ("verify", "up", "--source", "dense"),
                    ("upcycle", "recipe.yaml"),
                    ("upcycle", "recipe.yaml", "--layers", "0:1"),
                ),
            ),
        ),
        own=True,
    ),
    "options": Kind(
        ("mine.yaml", "text", "run", "run2", "hf", "tok", "dense", "up", "recipe.yaml"),
        (
            Group(
                (),
                (),
                (
                    ("generate", "hf", *SHORT),
                    ("generate", "run", "--tokenizer", "tok", *SHORT),
                    ("evaluate", "run", "--json"),
                    ("export", "run", "o", "--max-shard-size", "1MB", "--dtype", "bfloat16"),
                    ("compare", "run", "run2", "--output", "o"),
                    ("explain", "mine.yaml", "--match", "mine.yaml", "--measure", "active"),
                    ("plan", "mine.yaml", "parallel.shard=2"),
                    ("verify", "up", "--source", "dense", "--layers", "0:1"),
                    ("plugins", "--json"),
                    ("config", "mine.yaml", "train.steps=2"),
                    ("config", "--keys", "train"),
                    ("upcycle", "recipe.yaml", "--dry-run"),
                    ("architectures", "--json"),
                    (*TRAIN, "--force"),
                    ("evaluate", "run", "mine.yaml"),
                    ("trace", "run", "--out", "o", "--tokens", "64"),
                    ("ablate", "run", "--tokens", "64", "--out", "o"),
                    ("surgery", "run", "o", "split", "--tokens", "64"),
                ),
            ),
        ),
        _option,
        own=True,
    ),
}
