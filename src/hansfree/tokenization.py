"""Texts as tokens, by the tokenizer that lies beside a model, with the word that each token belongs to."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch

from hansfree.core import Tokens
from hansfree.errors import UserError
from hansfree.torchvision_guard import import_torchvision

FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
"""One of these makes a folder one with a tokenizer."""


@final
@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer that makes :class:`~hansfree.core.Tokens`, with the word of each token."""

    inner: Any
    limit: int
    """The most tokens that the model takes."""

    @cached_property
    def vocabulary(self) -> str:
        """A digest of which token has which number: equal where two tokenizers write texts with the same numbers."""
        listed = sorted(self.inner.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
        return hashlib.sha256("\n".join(f"{id} {token}" for token, id in listed).encode()).hexdigest()

    def tokens_of(self, texts: Sequence[str], *, length: int | None = None) -> Tokens:
        """Texts as tokens, padded on the right to the longest of them; ``length`` cuts longer ones off.

        Raises ``UserError`` for no text at all, for an empty one, and for one that is longer than the model takes where
        no length says that it may be cut.
        """
        return self._coded([] if isinstance(texts, str) else list(texts), length, split=False)

    def tokens_of_words(self, texts: Sequence[Sequence[str]], *, length: int | None = None) -> Tokens:
        """The same for texts that are lists of words: ``word_ids`` then count these."""
        return self._coded([list(words) for words in texts], length, split=True)

    def _coded(self, texts: list[Any], length: int | None, *, split: bool) -> Tokens:
        if not texts:
            raise UserError("Texts must be a list with at least one of them, but there is none; give a list of texts.")
        for number, text in enumerate(texts):
            if not "".join(text).strip():
                raise UserError(f"Text {number} is empty, and nothing can be said of it; leave it out.")
        coded = self.inner(
            texts,
            padding=True,
            padding_side="right",
            truncation=length is not None,
            max_length=length,
            is_split_into_words=split,
        )
        ids = torch.tensor(coded["input_ids"])
        if ids.shape[1] > self.limit:
            raise UserError(
                f"A text has {ids.shape[1]} tokens, but the model takes {self.limit}; give length={self.limit} to "
                "have longer texts cut off."
            )
        words = [[-1 if word is None else word for word in coded.word_ids(n)] for n in range(len(texts))]
        return Tokens(ids, torch.tensor(coded["attention_mask"]).bool(), torch.tensor(words))

    def pieces(self, tokens: Tokens) -> list[list[str]]:
        """What each token stands for, text by text and without the padding."""
        rows = zip(tokens.ids.tolist(), tokens.mask.tolist())
        return [self.inner.convert_ids_to_tokens([id for id, real in zip(*row) if real]) for row in rows]


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in ``folder``."""
    return any((folder / name).is_file() for name in FILES)


def load_tokenizer(folder: Path, *, limit: int = 10**9) -> Tokenizer:
    """The tokenizer in ``folder``, for a model that takes ``limit`` tokens. Raises ``UserError`` where there is none.

    Nothing is fetched. Of two limits, that of the tokenizer and ``limit``, the smaller holds.
    """
    if not has_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer; name a text model's folder with tokenizer.json in it.")
    with suppress(ImportError):
        import_torchvision()  # transformers imports it wherever it finds it, and fails where it does not match torch
    try:
        transformers = import_torchvision("transformers")
    except ImportError as error:
        raise UserError(f"Texts need an extra: pip install 'hansfree[text]' ({error}).") from error
    try:
        inner = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file raises many kinds
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"The tokenizer in {folder} cannot be read ({first}); restore it.") from error
    if not inner.is_fast:
        raise UserError(f"The tokenizer in {folder} does not tell words apart; add its tokenizer.json.")
    return Tokenizer(inner, min(inner.model_max_length, limit))
