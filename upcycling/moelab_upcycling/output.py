"""The output folder: what a run finds there, may keep, and leaves behind. The index comes last and means complete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from moelab.across_versions import as_ever
from moelab.atomic import in_bytes
from moelab.checksums import ALGORITHM
from moelab.config.upcycle import RecipeConfig
from moelab.data.lineage import LINEAGE, Lineage, converted, lineage_of
from moelab.data.seen import carried_record
from moelab.errors import CheckpointError
from moelab.hf.carried import carried_files
from moelab.hf.files import INDEX_FILE, READING, SINGLE_FILE, read_json
from moelab.records import Record
from moelab.registry import Registry
from moelab.safe_files import an_object, parse_json, read_bytes
from moelab_upcycling.plan import Plan, Shard
from moelab_upcycling.same_plan import completed, hash_there
from moelab_upcycling.worker import ShardResult, light_registry
from moelab_upcycling.writer import PARTIAL, explain, write_text

logger = logging.getLogger("moelab")

PLAN_FILE = "upcycle.json"
MANIFEST = "upcycle_manifest.jsonl"
_SPARE = 1.02  # of the bytes still to write, that must be free


class OutputFolder:
    """Opened for one plan: refuses a folder that holds anything else."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Nothing is written yet. CheckpointError also where what goes along with the source can't be read."""
        self.folder, self.plan = folder, plan
        self.hash = plan.hash  # by which the folder goes
        sources = [Path(source) for source in plan.sources]
        self.carried = carried_files(sources[0]) | carried_record(sources)
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder}: is a file; output=DIR names a folder to be made")
        for source in plan.sources:
            if folder.resolve() == Path(source):
                raise CheckpointError(f"{folder}: is the source itself; choose another output folder")
        held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if (folder / PLAN_FILE).exists():
            self.hash = self._hash_there(Record(str(folder / PLAN_FILE), read_json(folder / PLAN_FILE), READING))
        elif any(not name.endswith(PARTIAL) for name in held):
            raise CheckpointError(f"{folder}: holds something else ({held[0]}, ...); choose an empty or new folder")

    def _hash_there(self, stored: Record) -> str:
        """CheckpointError where another plan began the folder."""
        registry = self._registry()
        found = hash_there(stored, self.plan, registry)
        if found is not None:
            return found
        ours = parse_json(json.dumps(self.plan.identity()), PLAN_FILE, READING)  # as it is stored
        theirs = completed(stored.record("identity", optional=True).values, registry)
        differing = [
            f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in ours if ours[key] != theirs.get(key)
        ]
        raise CheckpointError(
            f"{self.folder}: was begun by another plan, so nothing can be resumed; choose another folder, delete it, "
            "or repeat its settings. " + "; ".join(differing[:3])[:600]
        )

    @contextmanager
    def locked(self, shared: bool) -> Iterator[None]:
        """Make the folder, and keep a second run out; `shared` lets in others that do other layers.

        Whoever is alone there removes what killed runs left half-written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise explain(error, self.folder) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
        except OSError as error:
            os.close(descriptor)
            raise CheckpointError(f"{self.folder}: another run is writing there; wait for it") from error
        try:
            if not shared:
                self._clean_up()
            yield
        finally:
            os.close(descriptor)

    def begin(self, shards: Iterable[Shard], versions: dict[str, str]) -> None:
        """Remove what a killed run left half-written, and say what this folder is becoming."""
        self.clean(shards)
        if not (self.folder / PLAN_FILE).exists():
            description = {
                "plan": self.hash,
                "identity": self.plan.identity(),
                "sources": list(self.plan.sources),
                "entry_points": self.plan.entry_points,
                "search_path": list(self.plan.search_path),
                "versions": versions,
            }
            write_text(self.folder / PLAN_FILE, json.dumps(description, indent=2) + "\n")

    def clean(self, shards: Iterable[Shard]) -> None:
        """Remove half-written files of these shards."""
        for shard in shards:
            for path in self.folder.glob(f".{shard.file}.*{PARTIAL}"):
                path.unlink(missing_ok=True)

    def _clean_up(self) -> None:
        """Remove every half-written file, and a line of the manifest that was cut off; nobody else may be here."""
        left = [path for path in self.folder.glob(f".*{PARTIAL}") if path.is_file()]
        size = sum(path.stat().st_blocks * 512 for path in left)
        try:
            for path in left:
                path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError), open(self.folder / MANIFEST, "r+b") as file:
                content = file.read()
                if content and not content.endswith(b"\n"):
                    file.truncate(content.rfind(b"\n") + 1)
        except OSError as error:
            raise explain(error, self.folder) from error
        if left:
            logger.warning("%s: removed half-written files, %s that a killed run left", self.folder, in_bytes(size))

    def check_space(self, nbytes: int) -> None:
        """CheckpointError where this many bytes more don't fit, before the first is written."""
        place = self.folder
        while not place.exists():
            place = place.parent
        state = os.statvfs(place)
        stale = sum(path.stat().st_blocks * 512 for path in self.folder.glob(f".*{PARTIAL}"))  # a killed run's
        free = state.f_bavail * state.f_frsize + stale
        if free < nbytes * _SPARE:
            raise CheckpointError(
                f"{self.folder}: {nbytes / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free; free some, "
                "choose another folder, or try the recipe with --sink hash or --layers a:b"
            )

    def recorded(self) -> dict[str, dict[str, str]]:
        """{shard file: {tensor: xxh3-128}} of the finished shards, as the manifest says."""
        found: dict[str, dict[str, str]] = {}
        path = self.folder / MANIFEST
        lines = read_bytes(path, READING).split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            with contextlib.suppress(CheckpointError):  # a line that was cut off by a kill: its shard is made again
                entry = Record(f"{path}:{number}", an_object(parse_json(line, path, READING), path, READING), READING)
                if entry.text("plan") == self.hash:
                    found[entry.text("shard")] = dict(entry.record("tensors").values)
        return found

    def record(self, result: ShardResult) -> None:
        """Append a finished shard to the manifest, synced."""
        entry = {
            "shard": result.file, "bytes": result.nbytes, "seconds": result.seconds,
            "plan": self.hash, "hash": ALGORITHM, "tensors": result.hashes,
        }  # fmt: skip
        path = self.folder / MANIFEST
        try:
            with open(path, "a+b", opener=_no_link) as file:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")  # after a line that was cut off
                file.write((json.dumps(entry) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise explain(error, path) from error

    def drop_index(self) -> None:
        """An index would say that the checkpoint is complete."""
        (self.folder / INDEX_FILE).unlink(missing_ok=True)

    def finish(self, hashes: dict[str, str]) -> None:
        """config.json, what is carried from the sources, and last the index."""
        write_text(self.folder / "config.json", json.dumps(self.plan.config_json(), indent=2, sort_keys=True) + "\n")
        for name, content in self.carried.items():
            write_text(self.folder / name, content)
        write_text(self.folder / LINEAGE, self._lineage().to_bytes())
        index = {
            "metadata": {"total_size": self.plan.total_size, "upcycle_hash": content_hash(self.plan, hashes)},
            "weight_map": {t.name: shard.file for shard in self.plan.shards for t in shard.tensors},
        }
        with contextlib.suppress(FileNotFoundError):
            (self.folder / SINGLE_FILE).unlink()
        write_text(self.folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _registry(self) -> Registry:
        return light_registry(self.plan.plugins, self.plan.entry_points, self.plan.search_path)

    def _lineage(self) -> Lineage:
        """Sources that say nothing of themselves are told apart by their weights, wherever they lie."""
        seeds = {"seed", "fingerprints", "max_shard_size"}
        identity = {key: value for key, value in self.plan.identity().items() if key not in seeds}
        identity["recipe"] = as_ever(identity["recipe"], RecipeConfig, self._registry(), "recipe")
        sources = zip(self.plan.sources, self.plan.fingerprints, strict=True)
        return converted(identity, self.plan.seed, [lineage_of(Path(folder), name) for folder, name in sources])


def _no_link(path: str, flags: int) -> int:
    """A link that lies there leads elsewhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def content_hash(plan: Plan, hashes: dict[str, str]) -> str:
    """One hash of these tensors' hashes: the same however they are sharded. It finds damage, not forgery."""
    digest = sha256()
    for tensor in sorted(plan.tensors, key=lambda t: t.name):
        if tensor.name in hashes:
            digest.update(f"{tensor.name} {tensor.dtype} {list(tensor.shape)} {hashes[tensor.name]}\n".encode())
    return digest.hexdigest()
