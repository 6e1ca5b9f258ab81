"""Weights, tokenizers and data by their name on the Hugging Face hub: `org/name`, `hf://datasets/org/name`.

A folder that is called org/name wins. Of weights configs, tokenizers and safetensors are fetched, never code, nothing
pickled; of a dataset the files that are asked for. What lies in the cache already is used without a network, and so is
everything where HF_HUB_OFFLINE is set. What comes back lies in the folder of one commit (.../snapshots/COMMIT,
huggingface_hub: "Understand caching"), which is what a receipt, a lineage, a log and a summary then name.

The spelling of datasets is huggingface_hub's: hf://datasets/ORG/NAME[@REVISION][/PATH] (its `HfFileSystem`; a `/` in a
revision is `%2F`, but for refs/pr/N and refs/convert/NAME).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from moelab.errors import CheckpointError, DataError
from moelab.paths import user_path

logger = logging.getLogger("moelab")
ALLOWED = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja", "LICENSE*", "NOTICE*")
REFUSED = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*/*")  # folders within hold other formats of the same weights
HF = "hf://"
MODEL, DATASET = "model", "dataset"
_REPOSITORY = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"(?:{HF})?({_REPOSITORY})(?:@([\w.-]{{1,100}}))?")
_DATASET = re.compile(rf"{HF}datasets/({_REPOSITORY})(?:@(refs/(?:pr|convert)/\w+|[\w.%-]{{1,100}}))?(?:/(.+))?/?")
# (kind, name, revision, the cache) -> commit: in one process a name means one commit, whatever is pushed meanwhile.
_MET: dict[tuple[str, str, str | None, str], str] = {}


def user_folder(text: str | Path, key: str | None = None) -> Path:
    """What a user names as a folder: a path, or where none is there a name on the hub, fetched or from the cache.

    Raises CheckpointError, saying what was looked for where and how to fetch it, for a name that can't be had.
    """
    path = user_path(text, key) if key is not None else user_path(text)
    match = _NAME.fullmatch(str(text)) if isinstance(text, str) else None
    if match is None or path.parent.exists():  # runs/nothing is a path that was mistyped, and no name
        return path
    named = (
        text
        if str(text).startswith(HF)
        else f"{text}: no such folder or file in {Path.cwd()}: give one that is there (./{text} is never taken for a "
        "name); as a name on the Hugging Face hub it"
    )
    try:
        return _snapshot(MODEL, match[1], match[2], ALLOWED, REFUSED)
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{named} needs a package: pip install 'moelab[hub]'") from error
    except OSError as error:
        raise CheckpointError(f"{named} {error}") from error


@dataclass(frozen=True)
class DatasetPath:
    """Files of a dataset, where they lie on this machine."""

    name: str  # hf://datasets/ORG/NAME, or with @REVISION
    commit: str
    path: Path  # in the commit's folder; may hold glob characters, may be missing


def is_dataset(text: str) -> bool:
    """Whether a path means something on the hub; whether that is there, `dataset_path` says."""
    return text.startswith(HF)


def dataset_path(text: str, patterns: Sequence[str] = ()) -> DatasetPath:
    """hf://datasets/ORG/NAME[@REVISION][/PATH] -> where it lies, fetched or from the cache.

    Fetched is PATH, a file, a glob or a folder; of the whole dataset what fits the `patterns` ("**/*.jsonl").
    Raises DataError for another spelling, for a whole dataset without patterns of a kind, and, saying how to fetch it,
    for what can't be had.
    """
    match = _DATASET.fullmatch(text)
    below, revision = PurePosixPath(), None
    if match is not None:
        below, revision = PurePosixPath(match[3] or ""), unquote(match[2]) if match[2] else None
    if match is None or ".." in below.parts or ".." in (revision or ""):
        raise DataError(f"data.source: '{text}' is no dataset's name; write {HF}datasets/ORG/NAME[@REVISION][/PATH]")
    if not below.parts and all(PurePosixPath(pattern).name == "*" for pattern in patterns):
        raise DataError(
            f"data.source: '{text}' would be all files of a dataset; say which, as in {text.rstrip('/')}/**/*.txt"
        )
    wanted = [_as_filter(pattern) for pattern in patterns]
    if below.parts:
        named = _as_filter(str(below))
        wanted = [named, *(f"{named}/{pattern}" for pattern in wanted or ["*"])]
    try:
        folder = _snapshot(DATASET, match[1], revision, wanted)
    except ModuleNotFoundError as error:
        raise DataError(f"data.source: {text} lies on the Hugging Face hub: pip install 'moelab[hub]'") from error
    except OSError as error:
        raise DataError(f"data.source: '{text}' {error}") from error
    name = f"{HF}datasets/{match[1]}" + (f"@{match[2]}" if match[2] else "")
    return DatasetPath(name, folder.name, folder / below)


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the cache holds (models--ORG--NAME/snapshots/COMMIT); None of any other folder."""
    return folder.name if _repository(folder) is not None else None


def folder_name(folder: Path) -> str:
    """What a folder is called: of a commit in the cache NAME, which its next commit is called too."""
    folder = folder.resolve()
    return _repository(folder) or folder.name


def _repository(folder: Path) -> str | None:
    """NAME of models--ORG--NAME/snapshots/COMMIT, or of a dataset's."""
    kind, *name = folder.parent.parent.name.split("--") if folder.parent.name == "snapshots" else [""]
    return name[-1] if kind in (f"{MODEL}s", f"{DATASET}s") and name else None


def _as_filter(pattern: str) -> str:
    """A glob as fnmatch takes it, whose * crosses folders: "**/" may also stand for none."""
    return pattern.replace("**/", "*")


def _snapshot(kind: str, name: str, revision: str | None, allow: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """The folder of a commit.

    Raises ImportError without the package, and OSError that says of the name why it can't be had, and how to fetch it.
    """
    hub: Any = import_module("huggingface_hub")
    errors: Any = import_module("huggingface_hub.errors")
    constants: Any = import_module("huggingface_hub.constants")  # no attribute of the package until it is imported
    key = (kind, name, revision, str(constants.HF_HUB_CACHE))
    filters = {"allow_patterns": list(allow), "ignore_patterns": list(ignore)}
    try:
        found = Path(hub.snapshot_download(name, repo_type=kind, revision=_MET.get(key, revision), **filters))
    except Exception as error:  # of httpx, or requests in earlier versions, too: a proxy's, a connection that broke off
        of_kind = "" if kind == MODEL else f" --repo-type {kind}"
        command = f"hf download {name}{of_kind}" + (f" --revision {revision}" if revision else "")
        raise OSError(_why(error, errors, command, offline=constants.HF_HUB_OFFLINE)) from error
    if key not in _MET:
        _MET[key] = found.name
        spelled = name if revision is None else f"{name}@{revision}"
        logger.warning("%s %s: from the Hugging Face hub, commit %s", kind, spelled, found.name)
    return found


def _why(error: Exception, errors: Any, command: str, *, offline: bool) -> str:
    """What became of a name that was asked for, and what to do; `command`: what fetches it."""
    if isinstance(error, errors.GatedRepoError):
        return f"has terms to be accepted on its page first; then: hf auth login; {command}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"is unknown, or private; for one of yours: hf auth login; {command}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision; name one that it has, or none"
    cause = type(error.__cause__ or error).__name__
    if isinstance(error, errors.LocalEntryNotFoundError):
        asked = "HF_HUB_OFFLINE forbids to ask for it" if offline else f"the hub can't be asked ({cause})"
        return f"is not, or not whole, in the cache, and {asked}; with a network: {command}"
    return f"can't be had ({cause}); with a network: {command}"
