"""How a file is damaged: as bytes, as a tree of JSON or YAML, as a header of safetensors; keyed by a seed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

DEEP = 30_000
ESCAPE = "\x1b]0;owned\x07\x1b[31mred\x1b[2J\u202e[/red]"
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 17, 255, 2**16, 2**31, 2**40, 2**63, 2**64, 10**30, 10**39, 10**400, -(2**63)),
    *(0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "null",
        "x",
        "[/b]",
        ESCAPE,
        "x" * 5000,
        "\ud800",
        "\0",
        "9" * 5000,
        "1e999",
        "évil",
        "${oc.env:HOME}",
        "${a",
    ),
    *("/proc/version/x", "../x", "/dev/zero", ".", "~nobody/x", "softmax_topk", "model.safetensors", "bfloat16", "F32"),
    *([], {}, [[]], [{}], [None], {"": 0}, {"a": 1}, {"name": []}, {"name": {}}, {"name": "x", "x": 1}, ["x", "x"]),
    *([0] * 3000, {"name": "expert_choice"}),
)
PIECES = (
    *(b"\0", b"\x1b[31m", b"\xff", b"\xe2\x80\xae", b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\n\n", b"- "),
    *(b"  ", b"\t", b"#", b"&a ", b"*a", b"<<: *a", b"---\n", b"%YAML 1.1\n", b"? ", b"| ", b"${", b"NaN", b"1e999"),
    *(b"9" * 5000, b"[" * DEEP, b'{"a":' * DEEP, b"{a: " * 500, b"\\ud800", b"\xef\xbb\xbf", b"null", b"-", b"~"),
    *(b"!!python/object/apply:os.system ['touch pwned']", b"\x93NUMPY", b"\x1f\x8b\x08", b"\x80\x04cposix\nsystem\n."),
)


def mutate(path: Path, chance: random.Random) -> str:
    """Damage a file in place; -> what was done, in words."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 24:  # by an earlier mutation
        return f"{path.name}: is gone already"
    if chance.random() < 0.03:
        return _replace(path, chance)
    if path.name.endswith(".safetensors"):
        return _header(path, chance) if chance.random() < 0.7 else _bytes(path, chance)
    if path.suffix in (".json", ".jsonl", ".yaml") and chance.random() < 0.7:
        return _tree_file(path, chance)
    return _bytes(path, chance)


def some_value(chance: random.Random) -> Any:
    """A value that is seldom right."""
    value = chance.choice(VALUES)
    if chance.random() < 0.03:
        for _ in range(chance.choice((70, 500))):
            value = [value]
    return value


def spelled(value: Any) -> str:
    """As an override's value: JSON is YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _replace(path: Path, chance: random.Random) -> str:
    how = chance.choice(("absent", "empty", "folder", "fifo", "loop", "device", "sparse"))
    path.unlink()
    if how == "empty":
        path.touch()
    elif how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 36)
    return f"{path.name}: {how}"


def _bytes(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content) + 1)
    if chance.random() < 0.3:  # where headers are
        at = min(at, chance.randrange(120))
    how = chance.choice(("flip", "set", "cut", "end", "insert", "insert", "double", "swap"))
    said = f"{path.name}: {how} at {at}"
    if how == "flip" and at < len(content):
        content[at] ^= 1 << chance.randrange(8)
    elif how == "set" and at < len(content):
        content[at] = chance.choice((0, 0x1B, 0x22, 0x5B, 0x7B, 0x7F, 0xFF, chance.randrange(256)))
    elif how == "cut":
        del content[at : at + chance.choice((1, 2, 8, 100))]
    elif how == "end":
        del content[at:]
    elif how == "double":
        content[at:at] = content[at : at + chance.choice((1, 40, 400))] * chance.choice((1, 2, 50))
    elif how == "swap":
        other = chance.randrange(len(content) + 1)
        content[at : at + 8], content[other : other + 8] = content[other : other + 8], content[at : at + 8]
    else:
        piece = chance.choice(PIECES)
        content[at:at] = piece
        said += f" {piece[:20]!r}"
    path.write_bytes(bytes(content))
    return said


def _tree_file(path: Path, chance: random.Random) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if path.suffix == ".jsonl":
            lines = text.split("\n")
            at = chance.randrange(len(lines))
            tree, said = change(json.loads(lines[at]), chance)
            lines[at] = json.dumps(tree)
            path.write_text("\n".join(lines))
            return f"{path.name}:{at + 1}: {said}"
        if path.suffix == ".json":
            tree, said = change(json.loads(text), chance)
            path.write_text(json.dumps(tree))
            return f"{path.name}: {said}"
        tree, said = change(yaml.safe_load(text), chance)
        path.write_text(_yaml(tree, chance))
        return f"{path.name}: {said}"
    except (ValueError, RecursionError, yaml.YAMLError):  # damaged already
        return _bytes(path, chance)


def _yaml(tree: Any, chance: random.Random) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        return json.dumps(tree) if chance.random() < 0.3 else yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return repr(tree)


def change(tree: Any, chance: random.Random) -> tuple[Any, str]:
    """A tree with one place changed, and what was done there."""
    places = list(_places(tree, ()))
    place = chance.choice(places)
    if not place or chance.random() < 0.02:
        return some_value(chance), "all of it is another value"
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    key, how = place[-1], chance.choice(("value", "value", "value", "delete", "name", "add", "swap", "many"))
    if how == "delete":
        del parent[key]
    elif how == "name" and isinstance(parent, dict):
        parent[chance.choice(("x", "", "name", ESCAPE, "y" * 3000, "0", "base", "9" * 5000))] = parent.pop(key)
    elif how == "add" and isinstance(parent, dict):
        parent[chance.choice(("extra", "base", "name", "plugins", ESCAPE, "1"))] = some_value(chance)
    elif how == "swap":
        other = chance.choice(places)
        value = tree
        for step in other:
            value = value[step]
        parent[key] = json.loads(json.dumps(value))
    elif how == "many" and isinstance(parent, list):
        parent *= chance.choice((2, 100))
    else:
        parent[key] = value = some_value(chance)
        return tree, f"{'.'.join(map(str, place))[:80]} = {repr(value)[:60]}"
    return tree, f"{'.'.join(map(str, place))[:80]}: {how}"


def _places(tree: Any, path: tuple[Any, ...]) -> Any:
    yield path
    if len(path) > 12:
        return
    for key, value in (
        tree.items() if isinstance(tree, dict) else enumerate(tree[:200]) if isinstance(tree, list) else ()
    ):
        yield from _places(value, (*path, key))


def _header(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):  # damaged already
        return _bytes(path, chance)
    body = bytearray(content[8 + length :])
    how = chance.choice(("tree", "tree", "tree", "shape", "dtype", "numbers", "length"))
    said = how
    names = [name for name in header if name != "__metadata__"]
    entry = header.get(chance.choice(names)) if names else None
    if how == "numbers" and body:
        at = chance.randrange(len(body)) // 4 * 4
        body[at : at + 64] = chance.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\x01\0\0\0")) * 16
        body = body[: len(content) - 8 - length]
    elif how == "shape" and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
        entry["shape"] = chance.choice((entry["shape"][::-1], [*entry["shape"], 1], [0], [2**40, 0], [], [-1], [2**63]))
    elif how == "dtype" and isinstance(entry, dict):
        entry["dtype"] = chance.choice(("F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "X", "I64"))
    else:
        header, said = change(header, chance)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = chance.choice((2**63, 2**31, len(text) + 8, 0)) if how == "length" else len(text)
    path.write_bytes(size.to_bytes(8, "little") + text + bytes(body))
    return f"{path.name}: header: {said}"


def fresh_copy(world: Path, parts: tuple[str, ...], scratch: Path) -> None:
    """`scratch` anew, with these files and folders of the world."""
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    for part in parts:
        if (world / part).is_dir():
            shutil.copytree(world / part, scratch / part)
        else:
            shutil.copy(world / part, scratch / part)
