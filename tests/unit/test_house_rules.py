"""The rules of the house, read from the sources: who imports whom, how large things are, what every file says."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = {
    "moelab": "core",
    "moelab_plugins": "plugins",
    "moelab_upcycling": "upcycling",
    "moelab_tools": "tools",
}
# Who may import whom; core imports none of the others.
ALLOWED = {
    "moelab": {"moelab"},
    "moelab_plugins": {"moelab", "moelab_plugins"},
    "moelab_upcycling": {"moelab", "moelab_upcycling"},
    "moelab_tools": set(PACKAGES),
}
FILE_LINES, FUNCTION_LINES = 400, 60
# The floors of core, lowest first: a room imports from its own and from lower floors, never from above or next door.
FLOORS = (
    {"printable", "processor", "derivatives"},
    {"errors", "launcher", "seeds", "components", "checksums", "shortage", "kernels", "processes", "ways"},
    {"paths", "safe_files", "alarms", "plugin_faults", "atomic"},
    {"records", "lock", "hub"},
    {"manifest", "tensor_file", "ways_file"},
    {"tensor_parts"},
    {"config"},
    {"data"},
    {"moe"},
    {"nn", "initialisers", "dense_sources"},
    {"hookspecs", "installed", "initialiser_promises"},
    {"plugin_modules"},
    {"registry"},
    {"layouts", "trust", "across_versions"},
    {"builder"},
    {"stored_weights"},
    {"hf", "planning"},
    {"checkpoint"},
    {"integrity"},
    {"origin", "in_shares"},
    {"loading", "parallel"},
    {"adapter"},
    {"training"},
    {"alignment"},
    {"session"},
    {"routes", "run_table"},
    {"surgery"},
    {"testing"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"moelab", "moelab.__main__"}  # the package's own front: it hands out names of every floor when asked


def _sources() -> list[Path]:
    return [path for folder in PACKAGES.values() for path in sorted((ROOT / folder).rglob("*.py"))]


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", _sources(), ids=_relative)
def test_a_source_file_keeps_the_rules(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    package = path.relative_to(ROOT).parts[1]
    ours = {name.split(".")[0] for name in _imports(tree)} & PACKAGES.keys()
    assert ours <= ALLOWED[package], f"{package} imports {ours - ALLOWED[package]}"
    assert ast.get_docstring(tree), "a module opens with what it is"
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"


def _modules() -> dict[str, Path]:
    """{dotted name: file} of all that we wrote."""
    found = {}
    for path in _sources():
        parts = path.relative_to(ROOT).with_suffix("").parts[1:]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _arrows(modules: dict[str, Path]) -> dict[str, set[str]]:
    """{module: the modules of ours that it imports}, at its top, inside functions or for types alone."""
    arrows: dict[str, set[str]] = {}
    for name, path in modules.items():
        arrows[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                arrows[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                below = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                arrows[name] |= below or {node.module}
        arrows[name] = (arrows[name] & modules.keys()) - {name}
    return arrows


def test_no_import_goes_round_in_a_circle() -> None:
    """Deferred imports count: a circle that is only deferred is still one."""
    arrows = {name: targets - DOORS for name, targets in _arrows(_modules()).items() if name not in DOORS}
    sorter = graphlib.TopologicalSorter(arrows)
    sorter.prepare()  # raises CycleError, which names the circle


def test_core_is_built_in_floors() -> None:
    """An arrow runs down, or stays in its room."""
    for name, targets in _arrows(_modules()).items():
        if not name.startswith("moelab.") or name in DOORS:
            continue
        room = name.split(".")[1]
        assert room in FLOOR_OF, f"{name}: say in FLOORS where this room stands"
        for target in sorted(targets - DOORS):
            other = target.split(".")[1]
            assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{name} imports {target}, which is not below it"


@pytest.mark.parametrize(
    ("library", "door"),
    [
        ("tensorboard", "plugins/moelab_plugins/observers/"),
        ("wandb", "plugins/moelab_plugins/observers/wandb.py"),
        ("trackio", "plugins/moelab_plugins/observers/trackio.py"),
        ("pyarrow", "plugins/moelab_plugins/observers/table.py"),
        ("megablocks", "plugins/moelab_plugins/expert_backends/_megablocks_install.py"),
        ("stk", "plugins/moelab_plugins/expert_backends/_megablocks_install.py"),
        (
            "transformers",
            ("core/moelab/adapter/", "core/moelab/alignment/mixin.py", "tools/moelab_tools/tokenizer_check.py"),
        ),
        ("trl", "core/moelab/alignment/trainers.py"),
        ("datasets", ("core/moelab/alignment/trainers.py", "tools/moelab_tools/judging.py")),
        ("triton", ("core/moelab/kernels/", "plugins/moelab_plugins/expert_backends/_megablocks_install.py")),
        ("lm_eval", ("tools/moelab_tools/judging.py", "plugins/moelab_plugins/text_filters/_lm_eval_tasks.py")),
        ("pandas", "core/moelab/run_table/frame.py"),
        ("xxhash", "core/moelab/checksums.py"),
    ],
)
def test_one_door_per_library(library: str, door: str | tuple[str, ...]) -> None:
    def is_library(name: str) -> bool:
        """`torch.utils.tensorboard` is; a module of our own that is named after it is not."""
        top = name.partition(".")[0]
        return top == library or (top not in PACKAGES and f".{library}" in name)

    users = {_relative(path) for path in _sources() if any(map(is_library, _imports(ast.parse(path.read_text()))))}
    assert all(user.startswith(door) for user in users), users


READER = "core/moelab/safe_files.py"
# Who may call what reads files of strangers: the one reader, and behind it what maps or loads the numbers themselves.
READERS = {
    "json.load": set(), "json.loads": {READER}, "json.JSONDecoder": set(),
    "yaml.load": set(), "yaml.safe_load": set(), "yaml.full_load": set(), "yaml.load_all": set(),
    "yaml.unsafe_load": set(), "yaml.safe_load_all": set(), "yaml.compose": set(),
    "safe_open": {"core/moelab/hf/files.py"}, "load_file": {READER},
    "np.load": {READER}, "np.fromfile": set(),  # curate/duplicates.py maps a file that it has just made
    "np.memmap": {"plugins/moelab_plugins/data_sources/_token_files.py", "tools/moelab_tools/curate/duplicates.py"},
    "np.loadtxt": set(), "np.genfromtxt": set(), "torch.load": set(), "pickle.load": set(), "pickle.loads": set(),
    "FastTokenizer.from_str": {"core/moelab/data/tokenizer_file.py"}, "Tokenizer.from_str": set(),
    "FastTokenizer.from_file": set(), "Tokenizer.from_file": set(), "FastTokenizer.from_buffer": set(),
    "Tokenizer.from_buffer": set(), "eval": set(), "__import__": set(),
    "exec": {"core/moelab/alignment/_guard.py"},  # an interpreter of its own, which runs one program within limits
    "ast.literal_eval": {"plugins/moelab_plugins/data_sources/_installed_text.py"},  # Python's own documentation
}  # fmt: skip
# Beside the reader, whole files are read from the kernel, from what is installed, and by the maker of a tokenizer.
WHOLE_FILES = {
    "core/moelab/nn/room.py", "core/moelab/training/limits.py", "core/moelab/lock.py",
    "core/moelab/processor.py",
    "tools/moelab_tools/qwen2_tokenizer.py",
    "plugins/moelab_plugins/data_sources/_installed_text.py",
}  # fmt: skip


def _called(tree: ast.AST) -> Iterator[str]:
    """Names of what is called: `json.loads`, `safe_open`, `?.` before the last part of longer ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield name if name.count(".") < 2 else f"?.{name.rpartition('.')[2]}"


@pytest.mark.parametrize("path", _sources(), ids=_relative)
def test_files_of_strangers_are_read_in_one_place(path: Path) -> None:
    tree, place = ast.parse(path.read_text()), _relative(path)
    for call in _called(tree):
        assert place in READERS.get(call, {place}), f"{place}: {call} is the business of {READER}"
        # Path's methods; the reader's functions of these names are called without a dot.
        if call.endswith((".read_text", ".read_bytes")):
            assert place in WHOLE_FILES, f"{place}: {call}: a file is read by {READER}, with a limit"
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & {"loads", "JSONDecoder", "from_file"}, f"{place}: reads by a name that hides whose it is"


def test_nothing_that_runs_what_it_reads_is_imported() -> None:
    for path in _sources():
        libraries = {name.split(".")[0] for name in _imports(ast.parse(path.read_text()))}
        assert not libraries & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, path


def test_upcycling_never_imports_the_model() -> None:
    for path in sorted((ROOT / "upcycling").rglob("*.py")):
        names = list(_imports(ast.parse(path.read_text())))
        assert not any(name.startswith(("moelab.nn", "moelab.builder", "moelab.training")) for name in names), path


def test_core_stands_alone() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", "import moelab, moelab.registry, moelab.training.trainer"],
        env={"PYTHONPATH": str(ROOT / "core"), "PATH": ""}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr


def test_no_component_is_singled_out_in_core() -> None:
    """No `if name == "..."`: what a plugin needs, its contract offers."""
    for path in sorted((ROOT / "core").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "name":
                constants = [c.value for c in node.comparators if isinstance(c, ast.Constant)]
                assert not any(isinstance(value, str) and value != "__main__" for value in constants), path


def test_the_lowest_versions_are_the_minima_of_pyproject() -> None:
    """Those of all that moelab needs, and of what the tests compare it with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = ("pytest", "pytest-xdist", "hypothesis", "submitit", "transformers", "pillow")
    minima = dict(entry.split(">=") for entry in project["dependencies"])
    minima |= dict(e.split(">=") for e in project["optional-dependencies"]["dev"] if e.split(">=")[0] in tools)
    lines = [line for line in (ROOT / "requirements.lowest").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert pinned.keys() == minima.keys()
    for name, version in pinned.items():
        assert (version + ".").startswith(minima[name] + "."), f"{name}: {version}, {minima[name]}"


def test_importing_a_builtin_plugin_is_cheap_of_heavy_libraries() -> None:
    code = (
        "import sys; from moelab import Registry; Registry(entry_points=False); "
        "heavy = {'tensorboard', 'wandb', 'trackio', 'pyarrow', 'megablocks', 'triton', 'transformers', "
        "'scipy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
