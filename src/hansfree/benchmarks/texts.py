"""What benchmarks of texts have in common: sentences of words, the sign of each word, tokens for a model.

A word is what stands between spaces; its pieces are the tokenizer's affair. Signs are human ratings of words out of
context: 1 good, -1 bad, 0 where nobody rated. So a word's truth does not know of negation.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hansfree.benchmarks.photographs import data_root
from hansfree.core import Batch, Split, TextSpec, Tokens, Words
from hansfree.errors import UserError
from hansfree.tokenization import Tokenizer, load_tokenizer

MODEL_SET = "minilm"
"""The data set that holds the model, and so the tokenizer, where no other is named."""


class Sentence(NamedTuple):
    """One text with its class, and the sign of each word."""

    words: tuple[str, ...]
    label: int
    signs: tuple[int, ...]
    planted: int | None = None
    """The place of the word that was put there as a shortcut."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class TextSplit(Split):
    """Sentences as the tokens of one tokenizer."""

    sentences: Sequence[Sentence]
    tokens: Tokens
    sign: Int[Tensor, "n length"]
    planted: Bool[Tensor, "n length"]
    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    bias: Int[Tensor, "n"] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    tiers: Mapping[str, Int[Tensor, "_"]] = field(default_factory=dict[str, Tensor])  # pyright: ignore[reportIncompatibleVariableOverride]

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The texts at ``index``, padded to the longest of them; nothing is drawn."""
        width = int(self.tokens.mask[index].sum(1).max())
        ids, mask, word_ids = (
            values[index, :width] for values in (self.tokens.ids, self.tokens.mask, self.tokens.word_ids)
        )
        written = tuple(self.sentences[n].words for n in index.tolist())
        sign, planted = self.sign[index, :width], self.planted[index, :width]
        return Batch(
            Tokens(ids, mask, word_ids),
            self.label[index],
            index,
            bias=None if self.bias is None else self.bias[index],
            words=Words(written, sign, planted),
        )

    def fingerprint(self) -> str:
        """A digest of texts and labels."""
        lines = (f"{sentence.label}\t{' '.join(sentence.words)}\n" for sentence in self.sentences)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def text_split(
    sentences: Sequence[Sentence],
    tokenizer: Tokenizer,
    length: int,
    *,
    bias: Int[Tensor, "n"] | None = None,
    tiers: Mapping[str, Int[Tensor, "_"]] | None = None,
) -> TextSplit:
    """``sentences`` as tokens, at most ``length`` of each."""
    tokens = tokenizer.tokens_of_words([sentence.words for sentence in sentences], length=length)
    most = max(len(sentence.words) for sentence in sentences)
    by_word = torch.tensor([[*sentence.signs, *[0] * (most - len(sentence.signs))] for sentence in sentences])
    places = torch.tensor([-2 if sentence.planted is None else sentence.planted for sentence in sentences])
    sign = by_word.gather(1, tokens.word_ids.clamp(min=0)) * (tokens.word_ids >= 0)
    return TextSplit(
        sentences=sentences,
        tokens=tokens,
        sign=sign,
        planted=tokens.word_ids == places[:, None],
        label=torch.tensor([sentence.label for sentence in sentences]),
        bias=bias,
        tiers=tiers or {},
    )


def open_tokenizer(folder: str | Path | None, length: int, signs: tuple[int, ...]) -> tuple[Tokenizer, TextSpec]:
    """The tokenizer of a model's folder (None: the published one), and what models must share with it.

    Raises ``UserError`` for a folder without one and for a length that it does not allow.
    """
    place = data_root() / MODEL_SET if folder is None else Path(folder).expanduser()
    if folder is None and not place.is_dir():
        raise UserError(
            f"{place} holds no tokenizer; run `hansfree data get {MODEL_SET}`, or name a model's folder as "
            "benchmark.tokenizer."
        )
    tokenizer = load_tokenizer(place)
    least = 3  # one between those that open and close a text
    if not least <= length <= tokenizer.limit:
        raise UserError(
            f"benchmark.length is {length}, but the tokenizer in {place} takes texts of {least} to {tokenizer.limit} "
            "tokens; choose a length between."
        )
    return tokenizer, TextSpec(tokenizer.vocabulary, length, signs)


def read_lexicon(path: Path, *, repeated: frozenset[str] = frozenset()) -> dict[str, int]:
    """Sign of each word: lines of word, tab, mean rating, and whatever follows; words in lower case, but for smileys.

    ``repeated`` are words that are known to stand there more than once, and have no sign. Raises ``UserError`` for
    another one that does, naming both lines, and for a line without a number.
    """
    signs, lines = dict[str, int](), dict[str, int]()
    for number, line in enumerate(read_lines(path), start=1):
        word, *rest = line.split("\t")
        try:
            rating = float(rest[0])
        except (IndexError, ValueError):
            raise UserError(f"{path}, line {number} is not a word, a tab and a number; mend it.") from None
        if word in repeated:
            continue
        if word in lines:
            raise UserError(f"{path}, line {number} rates {word!r} again, as line {lines[word]} does; leave one out.")
        lines[word], signs[word] = number, (rating > 0) - (rating < 0)
    return signs


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not empty. Raises ``UserError`` where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name the folder that holds it.") from error
    return [line for line in text.split("\n") if line.strip()]


def sign_of(word: str, lexicon: Mapping[str, int]) -> int:
    """The sign of a word as it is written, else in lower case, else without the punctuation around it; 0: unknown."""
    lower = word.casefold()
    return next((lexicon[form] for form in (word, lower, lower.strip(_AROUND)) if form in lexicon), 0)


_AROUND = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def plain(words: Sequence[str]) -> str:
    """A text without what does not tell it from another: letter case, punctuation around words, empty words."""
    return " ".join(bare for word in words if (bare := word.casefold().strip(_AROUND)))
