"""Every command of README and docs is typed in, in small; one that can't be is declared here with its reason.

A document's commands run in its order, in a folder that holds what the document assumes to be there. A command that is
not ours (`python`, ...) and has no line here fails; so does a line here that no document needs any more.
"""

from __future__ import annotations

import glob
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import click
import pytest

from dense_checkpoints import Tiny, write_dense
from documents import blocks, commands, named
from moelab_tools.cli import COMMANDS, moelab, run
from moelab_tools.command_pages import GENERATED, page

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
SHOWN = [shown for name in DOCUMENTS for shown in commands(ROOT / name, name)]

# What makes a command small, laid over it: a step takes milliseconds, and no text that is not installed is read.
TEXT = ["data.source.name=embedded", "data.source.domains=[code_py]", "data.source.max_bytes_per_domain=60000"]
RUN = [
    "train.steps=2", "train.batch_size=2", "train.sequence_length=32", "train.log_every=1", "evaluation.sequences=4",
    "evaluation.sample_tokens=4", *TEXT,
]  # fmt: skip
WIDTHS = ["model.moe.layout.num_experts=8", "model.moe.layout.moe_intermediate_size=16"]
UPCYCLING = [
    "model.vocab_size=null", *WIDTHS, "model.moe.layout.num_experts_per_tok=2",
    "model.moe.shared_expert.intermediate_size=48", "workers=1",
]  # fmt: skip
SMALL: dict[str, list[str]] = {
    "train": RUN,
    "evaluate": ["evaluation.sequences=4"],
    "generate": ["--tokens", "4"],
    "trace": ["--tokens", "64"],
    "data": ["sources=[{name: embedded, max_bytes_per_domain: 40000}]", "workers=1"],
    "upcycle": UPCYCLING,
    "surgery": ["--tokens", "128"],
    "export": ["--force"],  # a document may have named its result before
    # Each run of theirs is a process of its own: tests/unit/tools/sweep and experiments train some. This builds all.
    "sweep": ["--dry-run"],
    "experiment": ["--dry-run"],
}


@dataclass(frozen=True)
class Instead:
    """What is typed for a command that shows a form (`CONFIG`, `[...]`) or asks for more than a test has."""

    typed: str


@dataclass(frozen=True)
class Not:
    """Why a command is not run here."""

    reason: str


A_BENCHMARK = Not("minutes, and figures of one machine; tests/unit/test_benchmarks.py runs it in small")
BY_HAND = Not("minutes, and figures of one machine; run by hand, its results are committed")
DECLARED: dict[str, Instead | Not] = {
    'moelab train CONFIG "data.source={name: jsonl, paths: [curated/kept], domain_key: domain}"': Not(
        "tests/flow/test_data_command.py trains on what it made"
    ),
    ". .venv/bin/activate": Not("make setup has made it; the tests run in it"),
    "moelab train configs/train/tiny_moe.yaml train.compile=true run_dir=runs/compiled": Not(
        "needs a C++ compiler; tests/unit/core/training/test_compiled.py"
    ),
    "moelab demo": Not("CI runs it in small, from the checkout (make short-demo) and from the wheel (.ci/wheel)"),
    'eval "$(_MOELAB_COMPLETE=bash_source moelab)"': Not("of the shell one is in; tests/unit/tools/test_completion.py"),
    "python examples/minimal_loop.py train/tiny_moe train.steps=20 run_dir=unused": Not("tests/unit/test_examples.py"),
    "torchrun --nproc-per-node 2 -m moelab train configs/train/tiny_moe.yaml run_dir=runs/two parallel.shard=2 "
    "parallel.expert=2": Not("starts processes: tests/flow/test_torchrun.py does"),
    "torchrun --nproc-per-node 4 --max-restarts 100 -m moelab train configs/train/tiny_moe.yaml parallel.shard=4": Not(
        "starts processes: tests/flow/test_torchrun.py does"
    ),
    "torchrun --nproc-per-node 4 -m moelab train configs/train/tiny_moe.yaml parallel.shard=4 parallel.expert=2 "
    "train.micro_batch_size=2": Not("starts processes: tests/flow/test_torchrun.py does"),
    "moelab evaluate runs/tiny_moe --tasks heldout_continuation,heldout_perplexity": Not(
        "needs the extra lm-eval: tests/optional/test_judging.py"
    ),
    "moelab evaluate runs/tiny_moe --tasks arc_easy,my_task.yaml --limit 100": Not(
        "needs the extra lm-eval: tests/optional/test_judging.py"
    ),
    "pip install 'moelab[lm-eval]'": Not("make test-extras installs it"),
    "pip install 'moelab[align]'": Not("make test-extras installs it"),
    "moelab align configs/align/tiny_sft_dpo.yaml": Not("needs the extra align: tests/optional/test_align.py"),
    "moelab align configs/align/tiny_sft_dpo.yaml run_dir=runs/chat": Not("needs the extra align"),
    "moelab chat runs/chat/02_dpo": Not("reads the terminal"),
    "git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers FOLDER": Not("the network"),
    "pip install parameterized": Not("what another library's tests need"),
    "MOELAB_TRANSFORMERS_CHECKOUT=FOLDER python -m pytest tests/optional -k mixins": Not("needs that checkout"),
    "tensorboard --logdir runs": Not("a server that runs until it is stopped"),
    "pip install triton==3.7.1 setuptools wheel packaging": Not("make setup-megablocks, which CI runs, does the same"),
    "pip install --no-deps --no-build-isolation stanford-stk==0.7.1 megablocks==0.10.0": Not(
        "make setup-megablocks, which CI runs, does the same"
    ),
    "pip install 'moelab[slurm]'": Not("needs an index that has moelab; that the extra exists is checked below"),
    "moelab sweep configs/train/tiny_moe.yaml seed=0..9 --slurm --slurm-option slurm_partition=gpu --slurm-option "
    "timeout_min=240": Not("needs Slurm; tests/unit/tools/sweep/test_slurm.py runs it on submitit's local executor"),
    "moelab train FILE... [KEY=VALUE...]": Instead("moelab train configs/train/tiny_moe.yaml run_dir=runs/form"),
    "moelab plan CONFIG [parallel.shard=N] [parallel.expert=M] [train.activation_checkpointing=1] "
    "[--device-memory GB]": Instead(
        "moelab plan configs/train/tiny_moe.yaml parallel.shard=4 parallel.expert=2 train.activation_checkpointing=1 "
        "--device-memory 80"
    ),
    "sbatch --export=ALL,RUN=runs/mine,PROCESSES=8 --gpus-per-node=8 examples/slurm/train.sbatch train/tiny_moe "
    "parallel.shard=8": Not("needs Slurm; tests/unit/test_examples.py runs the script on programs of Slurm's names"),
    "moelab chat runs/tiny_moe": Not("reads the terminal: tests/unit/tools/test_talking.py gives it one"),
    "moelab generate runs/tiny_moe --prompts prompts.jsonl --samples 4 --out texts.jsonl": Not(
        "needs such a file: tests/unit/tools/test_talking.py"
    ),
    "moelab generate runs/tiny_moe --prompts sums.jsonl --samples 8 --out said.jsonl": Not(
        "needs such a file: tests/unit/tools/test_talking.py"
    ),
    'moelab synthesise said.jsonl --reward "{name: exact_answer, take: last_number}" --out synthetic': Not(
        "needs what the line before it writes: tests/unit/tools/synthesis/test_synthesise.py"
    ),
    "moelab critique configs/synthesis/principles.yaml data=[asked.jsonl] generator.name=checkpoint "
    "generator.path=runs/tiny_moe output=made": Instead(
        "moelab critique configs/synthesis/principles.yaml data=[data.yaml] generator.name=checkpoint "
        "generator.path=runs/tiny_moe generator.max_new_tokens=4 output=made"
    ),
    "moelab evolve data=[asked.jsonl] generator.name=checkpoint generator.path=runs/tiny_moe output=evolved": Instead(
        "moelab evolve data=[data.yaml] generator.name=checkpoint generator.path=runs/tiny_moe "
        "generator.max_new_tokens=4 output=evolved"
    ),
    "moelab tag data=[chats.jsonl] least=2 generator.name=checkpoint generator.path=runs/tiny_moe output=tagged": Not(
        "needs such a file: tests/unit/tools/synthesis/test_tag.py"
    ),
    "moelab train train/tiny_long": Instead("moelab train train/tiny_long stages.0.steps=1"),
    "moelab upcycle SOURCE OUTPUT": Instead("moelab upcycle Qwen2-7B elsewhere"),
    "python benchmarks/cpu_step.py --out benchmarks/results": A_BENCHMARK,
    "python benchmarks/experts.py --out benchmarks/results": BY_HAND,
    "python benchmarks/cpu_parts.py --out benchmarks/results": BY_HAND,
    "python benchmarks/products.py --out benchmarks/results": BY_HAND,
    "python benchmarks/step_parts.py --out benchmarks/results": BY_HAND,
    "python benchmarks/record_routing.py runs/mine": A_BENCHMARK,
    "python benchmarks/curate.py --mb 4000 --kills 20 --work WORK --tokenizer bytes": BY_HAND,
    "python benchmarks/data_rates.py --work WORK": BY_HAND,
    "python benchmarks/gpu.py --out benchmarks/results": Not(
        "needs a GPU; test_benchmarks.py sees what it says without"
    ),
    "python benchmarks/make_source.py /tmp/source --layers 4 --vocab-size 4096": Not("writes 2 GB"),
    "python benchmarks/upcycle.py /tmp/source /tmp/scratch model.vocab_size=4096 --out benchmarks/results": Not(
        "converts 16 GB"
    ),
    "python benchmarks/upcycle_parts.py /tmp/source model.vocab_size=4096 --output /tmp/scratch/parts "
    "--out benchmarks/results": Not("makes 8 GB"),
    "python -m moelab_tools.experiments.pages docs/findings.md": Not(
        "tests/unit/tools/experiments/test_pages.py holds the page to what this writes"
    ),
    "MOELAB_LLAMA_CPP=FOLDER python -m pytest tests/optional -k llama -s": Not(
        "needs llama.cpp, built by the line above"
    ),
}

# What a document takes to be there: its own commands make the rest. {path: what `made` calls it}
EVERYTHING = {
    **{f"runs/{name}": "moe_seed0" for name in ("moe", "tiny_moe", "sigmoid", "switch", "mine")},
    **{f"runs/{name}": name for name in ("moe_seed0", "moe_seed1", "dense_seed0", "dense_seed1")},
    "Qwen2-7B": "dense", "upcycled": "exported", "exported/tiny_moe": "exported",
    "traces/moe": "trace", "traces/other": "trace",
}  # fmt: skip
ASSUMED = {
    "README.md": {"Qwen2-7B": "dense"},
    "docs/howto.md": {"Qwen2-7B": "dense", "upcycled": "exported"},
    "docs/upcycling.md": {"Qwen2-7B": "dense"},
    "docs/surgery.md": {},
    "docs/traces.md": {"runs/moe": "moe_seed0", "traces/other": "trace"},
    "docs/checkpoints.md": {"Qwen2-7B": "dense", "upcycled": "exported", "runs/tiny_moe": "moe_seed0",
                            "exported/tiny_moe": "exported"},
}  # fmt: skip


def test_every_declared_command_is_in_a_document() -> None:
    assert DECLARED.keys() <= {shown.text for shown in SHOWN}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of each kind and a dense checkpoint, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    config = str(ROOT / "configs/train/tiny_moe.yaml")
    for name, *settings in (("moe",), ("dense", "model.moe=null")):
        for seed in (0, 1):
            where = [f"run_dir={folder / f'{name}_seed{seed}'}", f"name={name}_seed{seed}", f"seed={seed}"]
            assert run(["train", config, *RUN, *settings, *where]) == 0
    assert run(["trace", str(folder / "moe_seed0"), "--out", str(folder / "trace"), "--tokens", "64"]) == 0
    assert run(["export", str(folder / "moe_seed0"), str(folder / "exported")]) == 0
    write_dense(folder / "dense", Tiny(hidden=64, width=96, layers=2, vocab=257))
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Call it with a document's name: the current folder is one in which that document makes sense."""

    def prepare(document: str) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        for target, source in ASSUMED.get(document, EVERYTHING).items():
            shutil.copytree(made / source, tmp_path / target)
        rest = "train: {steps: 2, batch_size: 2, sequence_length: 32}\nevaluation: {sequences: 4}\n"
        (tmp_path / "data.yaml").write_text(f"data: {{source: {{name: embedded, domains: [code_py]}}}}\n{rest}")

    return prepare


@pytest.mark.parametrize("document", sorted({shown.document for shown in SHOWN}))
def test_the_commands_of_a_document_do_what_it_says(
    document: str, world: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    world(document)
    failed = []
    for shown in (shown for shown in SHOWN if shown.document == document):
        declared = DECLARED.get(shown.text)
        if isinstance(declared, Not):
            continue
        typed = declared.typed if declared else shown.text
        for line in typed.split(" && "):
            complaint = _type(line, capsys)
            if complaint:
                failed.append(f"{document}:{shown.line}: {line}\n    {complaint}")
    assert not failed, "\n".join(failed)


def _type(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run one line; what is wrong with it, or nothing."""
    program, *words = shlex.split(line)
    if program == "moelab":
        words = [found for word in words for found in _as_a_shell_would(word)]
        if ">" in words:  # into a file
            words = words[: words.index(">")]
        code = run([*words, *SMALL.get(words[0] if words else "", [])])
        told = capsys.readouterr()
        return f"exit code {code}: {told.err[-500:]}" if code else ""
    if program == "make":  # what it would do; .ci/run does it
        outcome = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return outcome.stderr if outcome.returncode else ""
    if program == "bash":  # syntax alone
        outcome = subprocess.run(["bash", "-n", ROOT / words[0]], capture_output=True, text=True, check=False)
        return outcome.stderr if outcome.returncode else ""
    return "is neither run here nor declared in DECLARED with a reason"


def _as_a_shell_would(word: str) -> list[str]:
    """The files that a pattern names; itself where there are none, or where it is a setting's."""
    return sorted(glob.glob(word)) or [word] if "*" in word and "=" not in word else [word]


def _command_of(words: list[str]) -> click.Command | None:
    return moelab.get_command(click.Context(moelab), words[0]) if words and words[0] in COMMANDS else None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_named_within_a_line_exist_with_their_options(document: str) -> None:
    for text in named(ROOT / document):
        words = text.removeprefix("moelab").split()
        command = _command_of(words)
        assert command is not None or words[0].startswith("-") or words[0] == "COMMAND", f"{text}: no such command"
        options = {name for each in (command or moelab).params for name in (*each.opts, *each.secondary_opts)}
        asked = {word for word in words if word.startswith("--")}
        assert asked <= options | {"--help", "--version"}, f"{text}: has no {asked - options}"


def _examples() -> Iterator[tuple[str, str]]:
    for name in COMMANDS:
        command = _command_of([name])
        assert command is not None
        text = re.sub(r"\\\n\s*", "", (command.help or "").partition("Example:")[2])
        for line in text.splitlines():
            if line.strip().startswith(f"moelab {name}"):
                yield name, re.sub(r"\s+#\s.*", "", line.strip())


@pytest.mark.parametrize(("name", "example"), list(_examples()))
def test_an_example_of_a_help_text_can_be_parsed(name: str, example: str) -> None:
    command = _command_of([name])
    assert command is not None
    command.make_context(name, shlex.split(example)[2:])  # raises UsageError


def _python_of(document: str) -> str:
    return next(block.text for block in blocks(ROOT / document, document) if block.language == "python")


@pytest.mark.parametrize("document", ["README.md", "docs/traces.md"])
def test_the_python_of_a_document_runs(document: str, world: Callable[[str], None]) -> None:
    world("every")
    exec(compile(_python_of(document), document, "exec"), {})  # our own text, not a stranger's


def test_a_command_that_nobody_declared_is_no_success(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    indented, fenced = "    moelab train a.yaml \\\n        seed=1  # why\n", "  ```bash\n  # why\n  cargo run\n  ```\n"
    page.write_text(f"Text:\n\n{indented}\n- a list\n\n{fenced}")
    assert [shown.text for shown in commands(page, "page.md")] == ["moelab train a.yaml seed=1", "cargo run"]
    assert "neither run here nor declared" in _type("cargo run", capsys)
    assert "no such config file" in _type("moelab train a.yaml seed=1", capsys)


def test_the_page_of_commands_is_up_to_date() -> None:
    assert (ROOT / "docs/commands.md").read_text() == page(), f"run: {GENERATED}"


def test_every_page_has_its_place_in_the_site() -> None:
    """Else `make docs` fails, which takes longer to say so."""
    index = (ROOT / "docs/index.md").read_text()
    trees = "\n".join(block.text for block in blocks(ROOT / "docs/index.md", "") if "toctree" in block.language)
    patterns = [re.sub(r"^.*<(.*)>$", r"\1", line) for line in trees.splitlines() if line and line[0] != ":"]
    for path in (ROOT / "docs").glob("*.md"):
        assert path.stem == "index" or any(fnmatch(path.stem, pattern) for pattern in patterns), (
            f"docs/{path.name}: name it in a toctree of docs/index.md"
        )
    assert "{toctree}" in index


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)", text):
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), f"{document}: {target} is not there"
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert anchor[1:] in {_anchor(title) for title in titles}, f"{document}: {target}{anchor} is not there"


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_extras_that_documents_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for document in DOCUMENTS:
        for found in re.findall(r"(?:moelab|\.)\[([a-z,]+)\]", (ROOT / document).read_text()):
            assert set(found.split(",")) <= extras.keys(), f"{document}: {found}"
