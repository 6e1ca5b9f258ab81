"""Text of Debian packages: as it was packed, whatever compressed it; what is wrong is named, and nothing unpacked."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moelab import ConfigError, Corpus, DataContext, DataError, Document, Places, Registry, build_corpus
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.hookspecs import DATA_SOURCES
from moelab.testing import DataSourceCase, check_data_source
from moelab_plugins.data_sources.debian import moelab_data_sources

pytest.importorskip("arpy", reason="needs arpy: pip install 'moelab[debian]'")

CONTROL = "Package: poems\nVersion: 1.2-3\nArchitecture: all\nDescription: text\n of several lines\n"
POEMS = {f"usr/share/doc/poems/{n}.txt": f"Poem {n}: é, and {n * n} lines that nobody else has." for n in range(20)}


@dataclass
class Packed:
    """Where a package lies, and its hash."""

    path: Path
    sha256: str

    @property
    def option(self) -> dict[str, str]:
        return {self.path.name: self.sha256}


def tar_of(files: dict[str, bytes | str | tarfile.TarInfo], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of bytes, texts, or entries without content; names as dpkg writes them."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            entry, data = tarfile.TarInfo(f"./{name}"), content.encode() if isinstance(content, str) else content
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return target.getvalue()


def ar_of(members: dict[str, bytes]) -> bytes:
    """ar(5), the common format of System V, as deb(5) asks for."""
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        parts.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
        parts.append(content + b"\n" * (len(content) % 2))
    return b"".join(parts)


def pack(folder: Path, name: str = "poems_1.2-3_all.deb", control: str = CONTROL, **more: Any) -> Packed:
    """`files`: of data.tar; `compress` and `ending` of both; `data`: the compressed data.tar itself."""
    compress, ending = more.get("compress", lzma.compress), more.get("ending", ".xz")
    data = more.get("data") or compress(tar_of(more.get("files", POEMS), more.get("form", tarfile.GNU_FORMAT)))
    members = {"debian-binary": b"2.0\n", f"control.tar{ending}": compress(tar_of({"control": control}))}
    return written(folder / name, ar_of(members | {f"data.tar{ending}": data}))


def written(path: Path, content: bytes) -> Packed:
    path.write_bytes(content)
    return Packed(path, hashlib.sha256(content).hexdigest())


def documents(base: Path, packages: dict[str, str], **options: Any) -> tuple[list[Document], DataContext]:
    """All that it reads, and its account."""
    found: list[Document] = []

    def tap(given: Any) -> Corpus:
        found.extend(given)
        return build_corpus([Document("a", "d", "1"), Document("b", "d", "2")], DataContext(ByteTokenizer(), 0.5))

    context = DataContext(ByteTokenizer(), places=Places(search=(base,)), tap=tap)
    part = {"name": "debian", "packages": packages, **options}
    Registry(entry_points=False).build(DATA_SOURCES, part, context, "data.source")
    return found, context


def zstd(content: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'moelab[parquet]'")
    target = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return bytes(target.getvalue())


@pytest.mark.parametrize(
    ("compress", "ending"),
    [(lzma.compress, ".xz"), (gzip.compress, ".gz"), (bz2.compress, ".bz2"), (zstd, ".zst"), (lambda tar: tar, "")],
)
def test_files_come_as_they_were_packed_under_the_names_they_have(
    compress: Callable[[bytes], bytes], ending: str, tmp_path: Path
) -> None:
    files = POEMS | {"usr/share/man/man1/poems.1.gz": gzip.compress(b".TH POEMS 1\n"), "usr/bin/poems": b"\x7fELF\0"}
    packed = pack(tmp_path, files=files, compress=compress, ending=ending)
    found, context = documents(tmp_path, packed.option)
    expected = {f"poems/{name}": text for name, text in POEMS.items()}
    assert {one.name: one.text for one in found} == expected | {"poems/usr/share/man/man1/poems.1.gz": ".TH POEMS 1\n"}
    assert {one.domain for one in found} == {"poems"}
    assert context.account.causes == {}
    assert {one.domain for one in documents(tmp_path, packed.option, domain="verse", files=["**/*.txt"])[0]} == {
        "verse"
    }


def test_it_is_a_data_source_and_its_manifest_says_the_version(tmp_path: Path) -> None:
    packed = pack(tmp_path)
    (component,) = moelab_data_sources()
    options = {"packages": {str(packed.path): packed.sha256}}
    check_data_source(component, options)
    corpus = DataSourceCase(component, options).build()
    assert corpus.manifest["poems"]["sources"] == {"poems": "1.2-3"}


def test_every_hash_is_compared_before_anything_is_read(tmp_path: Path) -> None:
    first, second = pack(tmp_path), pack(tmp_path, "others_1_all.deb", files={"usr/share/doc/a.txt": "changed since"})
    with pytest.raises(
        DataError, match=rf"others_1_all\.deb is another file.*{second.sha256}, and the config says 0000"
    ):
        documents(tmp_path, first.option | {second.path.name: "0" * 64})
    assert len(documents(tmp_path, first.option | {second.path.name: second.sha256.upper()})[0]) == len(POEMS) + 1


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def test_links_devices_and_what_is_too_large_are_left_out_and_counted_where_they_were_wanted(tmp_path: Path) -> None:
    doc = "usr/share/doc/poems"
    files: dict[str, Any] = {
        f"{doc}/0.txt": "A poem.", "up": entry(f"./{doc}/up.txt", tarfile.SYMTYPE, "/etc/passwd"),
        "out": entry(f"./{doc}/out.txt", tarfile.SYMTYPE, "../../../../../etc/passwd"),
        "hard": entry(f"./{doc}/hard.txt", tarfile.LNKTYPE, f"./{doc}/0.txt"),
        "pipe": entry(f"./{doc}/pipe.txt", tarfile.FIFOTYPE), "elsewhere": entry("./bin/x", tarfile.SYMTYPE, "y"),
        "folder": entry(f"./{doc}/folder.txt", tarfile.DIRTYPE), f"{doc}/large.txt": b"x" * 30_000,
        f"{doc}/bomb.txt.gz": gzip.compress(b"\n" * 3_000_000), "../../outside.txt": "not below the root",
    }  # fmt: skip
    packed = pack(tmp_path, files=files)
    found, context = documents(tmp_path, packed.option, largest_mb=0.02)
    assert [(one.name, one.text) for one in found] == [("poems/usr/share/doc/poems/0.txt", "A poem.")]
    assert {what: cause.count for what, cause in context.account.causes.items()} == {
        "files of packages left out, links": 3, "files of packages left out, no regular files": 1,
        "files of packages left out, of more than 0.02 MB": 2,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [packed.path.name], "nothing is unpacked"


def test_what_is_no_text_ends_it_with_its_name_or_is_counted_where_asked(tmp_path: Path) -> None:
    doc = "usr/share/doc/poems"
    bad = {"latin.txt": "é".encode("latin-1"), "nul.txt": b"a\0b", "cut.txt.gz": gzip.compress(b"text" * 99)[:-9]}
    for name, content in bad.items():
        packed = pack(tmp_path, files=POEMS | {f"{doc}/{name}": content})
        with pytest.raises(DataError, match=rf"poems_1\.2-3_all\.deb/{doc}/{name}"):
            documents(tmp_path, packed.option)
    packed = pack(tmp_path, files=POEMS | {f"{doc}/{name}": content for name, content in bad.items()})
    found, context = documents(tmp_path, packed.option, skip_bad=True)
    assert len(found) == len(POEMS)
    assert [(what.rpartition(", ")[2], cause.count) for what, cause in context.account.causes.items()] == [
        ("no text in UTF-8", 2), ("that can't be decompressed", 1),
    ]  # fmt: skip


def damaged(folder: Path) -> dict[str, tuple[bytes, str]]:
    """{name: (content, what is said)}."""
    whole = pack(folder).path.read_bytes()
    data = lzma.compress(tar_of(POEMS))
    control = lzma.compress(tar_of({"control": CONTROL}))
    long = tar_of({"usr/share/doc/" + "x" * 3_000_000 + ".txt": "text"}, tarfile.PAX_FORMAT)
    back = ar_of({"debian-binary": b"2.0\n"}).replace(b"4         `", b"-60       `")
    return {
        "text.deb": (b"no package at all", "is no Debian package"),
        "thin.deb": (whole.replace(b"!<arch>", b"!<thin>", 1), "is no Debian package"),
        "cut.deb": (whole[:-100], "is cut short"),
        "empty.deb": (ar_of({"debian-binary": b"2.0\n"}), "has no control.tar"),
        "backwards.deb": (back, "is cut short, or not whole"),
        "nameless.deb": (ar_of({"control.tar": tar_of({"control": "Version: 1\n"}), "data.tar": b""}), "says no name"),
        "half.deb": (ar_of({"control.tar.xz": control, "data.tar.xz": data[: len(data) // 2]}), "can't be read as a"),
        "false.deb": (ar_of({"control.tar.xz": control, "data.tar.xz": b"\xfd7zXZ\0nonsense"}), "can't be read as a"),
        "headers.deb": (ar_of({"control.tar.xz": control, "data.tar": long}), "more than 1 MiB of headers"),
    }


@pytest.mark.parametrize("name", ["text", "thin", "cut", "empty", "backwards", "nameless", "half", "false", "headers"])
def test_a_damaged_package_is_named_and_skip_bad_does_not_hide_it(name: str, tmp_path: Path) -> None:
    content, said = damaged(tmp_path)[f"{name}.deb"]
    packed = written(tmp_path / f"{name}.deb", content)
    with pytest.raises(DataError, match=rf"{name}\.deb .*{said}"):
        documents(tmp_path, packed.option, skip_bad=True)


def test_without_a_hash_or_a_package_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="packages: nothing to read"):
        documents(tmp_path, {})
    with pytest.raises(ConfigError, match=r"packages: 'abc' is no sha256 of a\.deb"):
        documents(tmp_path, {"a.deb": "abc"})
    with pytest.raises(DataError, match=r"no file or folder 'a\.deb'"):
        documents(tmp_path, {"a.deb": "0" * 64})
