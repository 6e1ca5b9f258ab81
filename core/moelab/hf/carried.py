"""What goes along with a model's weights: token ids, generation settings, chat template, licence, tokenizer files.

Free of torch: upcycling carries them too. The names are those that transformers 5.23 reads (tokenization_utils_base.py,
generation/configuration_utils.py) and that Hugging Face repositories keep their terms in.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moelab.errors import CheckpointError, ConfigError
from moelab.hf.files import READING, read_json
from moelab.hf.gguf_file import GGUFFile, gguf_of
from moelab.hf.gguf_tokenizer import carried_by
from moelab.safe_files import read_bytes

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
SIDE_FILES = (
    "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
TERMS = ("license*", "licence*", "notice*", "copying*", "use_policy*")  # in any case of letters
README, SOURCE_README = "README.md", "README.source.md"  # a copy's own card would say what only the source is
ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json


def carried_files(folder: Path) -> dict[str, bytes]:
    """{name: content} of all that a copy of the weights in a Hugging Face folder keeps, but for config.json.

    Of a GGUF file what its metadata says of the same; of a folder that holds one its licence too.
    """
    gguf = gguf_of(folder)
    if gguf is not None:
        return terms(folder) | carried_by(GGUFFile.of(gguf))
    names = [name for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE) if (folder / name).is_file()]
    tokenizer = {name: _read(folder / name) for name in names}
    return tokenizer | tokenizer_side_files(folder) | generation_settings(folder) | terms(folder)


def tokenizer_side_files(folder: Path) -> dict[str, bytes]:
    """{name: content} of what stands beside a tokenizer.json and its tokenizer_config.json."""
    return {name: _read(folder / name) for name in SIDE_FILES if (folder / name).is_file()}


def terms(folder: Path) -> dict[str, bytes]:
    """{name: content} of licences and notices; the model card comes as README.source.md. A GGUF file has none."""
    if not folder.is_dir():
        return {}
    found = {
        path.name: _read(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name.lower(), pattern) for pattern in TERMS)
    }
    for name in (README, SOURCE_README):
        if (folder / name).is_file():
            found[SOURCE_README] = _read(folder / name)
    return found


def generation_settings(folder: Path) -> dict[str, bytes]:
    """generation_config.json, checked, where there is one."""
    path = folder / GENERATION_FILE
    if not path.is_file():
        return {}
    token_ids(read_json(path), path)
    return {GENERATION_FILE: _read(path)}


def token_ids(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The ids among `fields`: {bos_token_id, eos_token_id, pad_token_id}, each a number, the end also a list of them.

    Raises CheckpointError naming `path` and the key.
    """
    found = {key: fields[key] for key in ID_FIELDS if fields.get(key) is not None}
    for key, value in found.items():
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise CheckpointError(f"{path}: {key}: must be a token id or a list of them, not {value!r}")
    return found


def largest_token_id(folder: Path) -> tuple[int, Path] | None:
    """(the largest id that the folder's tokenizer gives, the file that says so), added tokens included.

    None where there is no tokenizer. Raises CheckpointError for a file that can't be read.
    """
    gguf = gguf_of(folder)
    if gguf is not None:
        tokens = GGUFFile.of(gguf).value("tokenizer.ggml.tokens", [])
        return (len(tokens) - 1, gguf) if tokens else None
    found: list[tuple[int, Path]] = []
    names = [TOKENIZER_FILE] if (folder / TOKENIZER_FILE).is_file() else ["vocab.json", "added_tokens.json"]
    for name in [*names, TOKENIZER_CONFIG_FILE]:
        path = folder / name
        if path.is_file():
            try:
                found += [(int(token_id), path) for token_id in _VOCABULARIES[name](read_json(path))]
            except (TypeError, ValueError, AttributeError, KeyError) as error:
                raise CheckpointError(f"{path}: is no tokenizer file ({error!r}); write it again") from error
    return max(found, key=lambda entry: entry[0], default=None)


def check_vocabulary(vocab_size: int, folder: Path) -> None:
    """Raises ConfigError where the tokenizer of `folder` gives ids that `vocab_size` rows have no place for."""
    largest = largest_token_id(folder)
    if largest is not None and largest[0] >= vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is less than {largest[0] + 1}, one more than the largest id of "
            f"{largest[1]} (added tokens included): those ids would have no row; write "
            f"model.vocab_size={largest[0] + 1} or more, or model.vocab_size=null to keep the source's rows"
        )


def _tokenizer_json(content: Mapping[str, Any]) -> list[int]:
    vocabulary = content["model"].get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))  # Unigram: a list
    return ids + [token["id"] for token in content.get("added_tokens", [])]


_VOCABULARIES = {
    TOKENIZER_FILE: _tokenizer_json,
    TOKENIZER_CONFIG_FILE: lambda content: list(content.get("added_tokens_decoder", {})),
    "added_tokens.json": lambda content: list(content.values()),
    "vocab.json": lambda content: list(content.values()),
}


def _read(path: Path) -> bytes:
    return read_bytes(path, READING)
