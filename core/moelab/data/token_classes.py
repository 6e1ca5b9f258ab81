"""Kinds of tokens, by how they are spelled: where a loss lies, beside in which text."""

from __future__ import annotations

import numpy as np

from moelab.data.tokenizer import Tokenizer

CLASSES = ("letters", "digits", "punctuation", "white space", "line break", "mixed", "part of a character", "special")
_REPLACEMENT = "�"


def class_of_ids(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """[vocab_size] uint8 into CLASSES, of each id decoded alone; ids that stand for no text are special.

    Surrounding spaces do not count: " the" is letters. A token of several kinds, or of letters with marks, is mixed; a
    byte of a character that is spelled with several is part of one.
    """
    special = set(tokenizer.special_tokens)
    texts = [tokenizer.decode([token]) if token < tokenizer.vocab_size else "" for token in range(vocab_size)]
    return np.array([CLASSES.index(_class_of(text, special)) for text in texts], np.uint8)


def _class_of(text: str, special: set[str]) -> str:
    if text == "" or text in special:
        return "special"
    if _REPLACEMENT in text:
        return "part of a character"
    inner = text.strip()
    if not inner:
        return "line break" if "\n" in text or "\r" in text else "white space"
    if inner.isalpha():
        return "letters"
    if inner.isnumeric():
        return "digits"
    return "mixed" if any(character.isalnum() for character in inner) else "punctuation"
