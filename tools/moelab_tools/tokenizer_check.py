"""Does transformers' AutoTokenizer give the ids that a model was trained on? Asked of a folder that was just written.

The one place that imports transformers, and only where it is installed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.data.tokenizer import Tokenizer

# White space, digits, letters of many kinds, accents apart from their letters, joined emoji, code, contractions.
PROBES = (
    "The capital of France is Paris.",
    "It's we'll DON'T they'Re",
    "  two blanks,\tthree\t\t\ttabs \n\n  \r\n\n end  ",
    " ",
    "\n",
    "1 22 333 4444 55555, 3.14159e-10 0x1F 1,000,000 ٣٤ ½ ²",
    "def f(x: int) -> list[int]:\n    return [x ** 2 for x in range(10)]  # != <= >>",
    "Ünïcödé é e\u0301 ñ n\u0303 ß İ ǅ ﬁ Å",
    "漢字かなカナ한국어 中文，标点。",
    "Здравствуй мир Γειά σου שלום مرحبا नमस्ते ไทย",
    "🙂👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 \u200b\ufeff",
    "<html><b>a & b</b></html> https://example.org/a?b=c_d-e#f",
    "\\alpha \\frac{1}{2} ∑∫≤ \u00a0\u2003|",
    "aaaaaaaaaaaaaaaaaaaaaaaa________________----------------",
)


@dataclass(frozen=True)
class Verdict:
    """What AutoTokenizer made of the probes."""

    version: str
    probes: int
    differing: tuple[str, ...] = ()  # the probes with other ids
    special: tuple[str, ...] = ()  # what is wrong with tokens that stand for no text
    error: str = ""

    @property
    def right(self) -> bool:
        return not (self.differing or self.special or self.error)

    def line(self, folder: Path) -> str:
        """One line for the terminal."""
        if self.right:
            return f"transformers {self.version}: AutoTokenizer gives the ids trained on ({self.probes} texts compared)"
        if self.error:
            return f"transformers {self.version}: AutoTokenizer can't read {folder}: {self.error}"
        found = []
        if self.differing:
            found.append(
                f"gives other ids than the model was trained on, in {len(self.differing)} of {self.probes} texts, as "
                f"{self.differing[0]!r}"
            )
        return (
            f"transformers {self.version}: AutoTokenizer {'; '.join([*found, *self.special])}. Read {folder} with "
            "PreTrainedTokenizerFast.from_pretrained, which takes tokenizer.json as it is"
        )


def check_auto_tokenizer(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> Verdict | None:
    """Compare on a few texts; None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    transformers.logging.set_verbosity_error()
    version = str(transformers.__version__)
    try:
        auto = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        differing = [text for text in PROBES if _ids(auto, text) != tokenizer.encode(text).tolist()]
        special = _special(auto, tokenizer, vocab_size)
    except Exception as error:  # whatever another version says of a file, or of a text once it has the file
        told = str(error).splitlines() or [""]
        return Verdict(version, len(PROBES), error=f"{type(error).__name__}: {told[0][:200]}")
    return Verdict(version, len(PROBES), tuple(differing), tuple(special))


def _ids(auto: Any, text: str) -> list[int]:
    return list(auto(text, add_special_tokens=False)["input_ids"])


def _special(auto: Any, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Ids without a row, and tokens whose id isn't the one trained on."""
    largest = max(auto.get_vocab().values())
    found = [] if largest < vocab_size else [f"has an id {largest} for {vocab_size} rows"]
    for token_id in sorted(auto.all_special_ids):
        name = auto.convert_ids_to_tokens(token_id)
        if tokenizer.decode([token_id]) != name:
            found.append(f"calls {token_id} {name!r}, which the model knows as {tokenizer.decode([token_id])!r}")
    return found[:3]
