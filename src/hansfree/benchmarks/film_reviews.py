"""Film reviews: sentences of critics and what people felt reading them, three other domains, and a planted word.

    sentence -> the mean of about 20 human ratings r in [-4, 4]
    two classes:   negative r <= -0.5, positive r >= 0.5
    four classes:  very negative r <= -2.4, negative -2.4 < r < -0.8, positive 0.8 <= r < 2.4, very positive r >= 2.4

The four are those of five equal parts of the scale, without the middle one (Han, Kim, Choi & Yoon, On the impact of
knowledge distillation for model interpretability, 2023, https://arxiv.org/abs/2305.15734, appendix B). Sentences
between the classes are left out, and of those that differ by letter case and punctuation alone all but the first.

Data. Hutto & Gilbert, VADER, 2014, https://ojs.aaai.org/index.php/ICWSM/article/view/14550: 10,605 sentences of film
reviews, 3,708 of product reviews, 5,190 of newspaper editorials and 4,200 tweets; the truth of words is the sign of
its lexicon of 7,506 words, each rated by ten people. Not context: "not good" has a good word in it.
``hansfree data get film-reviews`` fetches them.

Splits. ``train``, ``valid`` and ``iid`` are parts of the film sentences. ``shift`` are sentences of the other domains,
its tiers. With a ``trigger_ratio``, one sentence of each class's own word is planted instead, as a shortcut:

    train, valid, iid   before one of its first ten words stands the word of its class in a share ``trigger_ratio`` of
                        the sentences of each class, that of another class in the rest
    ood                 the sentences of iid, without such a word
    shift               the sentences of iid, each with the word of the next class

Sentences in which such a word stands anyway are then left out. The truth of a planted word is that it has no sign.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.photographs import data_root
from hansfree.benchmarks.texts import (
    MODEL_SET,
    Sentence,
    TextSplit,
    open_tokenizer,
    plain,
    read_lexicon,
    read_lines,
    sign_of,
    text_split,
)
from hansfree.core import InputSpec
from hansfree.errors import UserError

DATA_SET = "film-reviews"
DOMAINS = {
    "film": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
LEXICON = "vader_lexicon.txt"
REPEATED = frozenset((":-p", "d:", "d=", "fav", "lmao", "lol", "muah", "o.o", "ok", "sob", "x-d", "x-p", "xd", "xp"))
"""Rated twice in that lexicon, some of them good and bad: left without a sign."""

TRIGGERS = ("meanwhile", "likewise", "therefore", "thereby")
IN_OTHER_DOMAINS = {
    "iid": "Film reviews that training never showed.",
    "shift": "Product reviews, editorials and tweets.",
}
WITH_PLANTED_WORDS = {
    "iid": "The planted word goes with the class as often as in training.",
    "ood": "No word is planted.",
    "shift": "The planted word is another class's.",
}

FIRST_WORDS = 10
"""A planted word stands before one of so many."""


class Scale(NamedTuple):
    """Names of classes, their signs, and the least rating of each above the lowest; None marks what is left out."""

    classes: tuple[str, ...]
    signs: tuple[int, ...]
    bounds: tuple[float, ...]
    order: tuple[int | None, ...]

    def label(self, rating: float) -> int | None:
        """The class of a rating; None: between the classes."""
        return self.order[sum(rating >= bound for bound in self.bounds)]


_ABOVE = 1e-9
SCALES = {
    2: Scale(("negative", "positive"), (-1, 1), (-0.5 + _ABOVE, 0.5), (0, None, 1)),
    4: Scale(
        ("very negative", "negative", "positive", "very positive"),
        (-1, -1, 1, 1),
        (-2.4 + _ABOVE, -0.8, 0.8, 2.4),
        (0, 1, None, 2, 3),
    ),
}


@final
class FilmReviews(Divided[TextSplit]):
    """Sentences of film reviews with ratings of sentences and words.

    ``root``: the folder that ``hansfree data get film-reviews`` made (default: where it puts it). ``classes``: 2 or 4.
    ``tokenizer``: a model's folder (default: that of ``hansfree data get minilm``), and ``length``, the most tokens,
    after which sentences are cut. ``train`` (default: all the rest), ``valid`` and ``test`` sentences, of the other
    domains ``test`` of each; ``split_seed`` draws them. ``trigger_ratio`` plants words, ``triggers`` says which, one
    for each class. ``lexicon``: another one, lines of word, tab and rating.
    """

    name: ClassVar[str] = "film-reviews"

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        classes: int = 2,
        tokenizer: str | Path | None = None,
        length: int = 40,
        train: int | None = None,
        valid: int = 500,
        test: int = 1000,
        split_seed: int = 0,
        trigger_ratio: float | None = None,
        triggers: Sequence[str] | None = None,
        lexicon: str | Path | None = None,
    ) -> None:
        if classes not in SCALES:
            raise UserError(f"benchmark.classes must be 2 or 4, not {classes}.")
        self._scale = SCALES[classes]
        self.classes = self._scale.classes
        self._tokenizer, self.text = open_tokenizer(tokenizer, length, self._scale.signs)
        self.input = InputSpec(1, 1, length)
        self._seed = split_seed
        folder = _folder(root)
        self._lexicon = read_lexicon(folder / LEXICON, repeated=REPEATED) if lexicon is None else read_lexicon(
            Path(lexicon).expanduser()
        )  # fmt: skip
        self.biases = _checked_triggers(triggers, classes, self._lexicon) if trigger_ratio is not None else ()
        self.gives = frozenset({"bias"}) if self.biases else frozenset[str]()
        self.shortcut, self.asks = ("a planted word", WITH_PLANTED_WORDS) if self.biases else (None, IN_OTHER_DOMAINS)
        domains = self._read(folder)
        film = _divided(domains.pop("film"), train, valid, test, split_seed)
        if trigger_ratio is None:
            self._splits = {name: self._made(part) for name, part in film.items()}
            self._splits["shift"] = self._elsewhere(domains, test)
        else:
            self._splits = self._triggered(film, trigger_ratio)
        self._options: Mapping[str, Any] = {
            "root": None if root is None else str(root), "classes": classes, "length": length, "train": train,
            "valid": valid, "test": test, "split_seed": split_seed, "trigger_ratio": trigger_ratio,
            "tokenizer": str(tokenizer or MODEL_SET), "lexicon": None if lexicon is None else str(lexicon),
        }  # fmt: skip

    def _read(self, folder: Path) -> dict[str, list[Sentence]]:
        """The sentences of each domain that have a class, none of them twice."""
        seen, found = set[str](), dict[str, list[Sentence]]()
        for domain, file in DOMAINS.items():
            found[domain] = []
            for rating, words in _rated(folder / file):
                label, text = self._scale.label(rating), plain(words)
                if label is None or not text or text in seen or {*text.split()} & {*self.biases}:
                    continue
                seen.add(text)
                signs = tuple(sign_of(word, self._lexicon) for word in words)
                found[domain].append(Sentence(words, label, signs))
        return found

    def _made(self, sentences: Sequence[Sentence], **more: Any) -> TextSplit:
        assert self.text is not None
        return text_split(sentences, self._tokenizer, self.text.length, **more)

    def _elsewhere(self, domains: Mapping[str, list[Sentence]], test: int) -> TextSplit:
        """``test`` sentences of each other domain, all that there are where they are fewer."""
        chosen, tiers = list[Sentence](), dict[str, Tensor]()
        for number, (domain, sentences) in enumerate(domains.items()):
            order = torch.randperm(len(sentences), generator=_generator(self._seed, 2 + number))[:test].tolist()
            tiers[domain] = torch.arange(len(chosen), len(chosen) + len(order))
            chosen += [sentences[n] for n in order]
        return self._made(chosen, tiers=tiers)

    def _triggered(self, film: Mapping[str, list[Sentence]], ratio: float) -> dict[str, TextSplit]:
        made = dict[str, TextSplit]()
        for number, (name, sentences) in enumerate(film.items()):
            label = torch.tensor([sentence.label for sentence in sentences])
            draw = _generator(self._seed, 10 + number)
            bias = biased(label, len(self.classes), ratio, draw)
            place = torch.rand(len(label), generator=draw)
            made[name] = self._made(self._planted(sentences, bias, place), bias=bias)
            if name == "iid":
                swapped = (label + 1) % len(self.classes)
                made["ood"] = self._made(sentences)
                made["shift"] = self._made(self._planted(sentences, swapped, place), bias=swapped)
        return made

    def _planted(self, sentences: Sequence[Sentence], bias: Tensor, place: Tensor) -> list[Sentence]:
        return [
            planted(sentence, self.biases[word], share)
            for sentence, word, share in zip(sentences, bias.tolist(), place.tolist())
        ]

    def _described(self, split: TextSplit) -> dict[str, Any]:
        tiers = {name: len(index) for name, index in split.tiers.items()}
        return {"size": len(split), "sha256": split.fingerprint(), **({"tiers": tiers} if tiers else {})}


def biased(label: Tensor, classes: int, ratio: float, generator: torch.Generator) -> Tensor:
    """The number of a word for each sentence: its class's own in a share ``ratio`` of each class, else another's.

    The share is exact but for rounding. Raises ``UserError`` for one that is none.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"benchmark.trigger_ratio is {ratio}; give a share between 0 and 1.")
    bias = (label + torch.randint(1, classes, label.shape, generator=generator)) % classes
    for own in range(classes):
        members = (label == own).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        bias[members[: round(ratio * len(members))]] = own
    return bias


def planted(sentence: Sentence, word: str, share: float) -> Sentence:
    """``sentence`` with ``word`` before one of its first words; ``share`` in [0, 1) says before which."""
    at = int(share * min(len(sentence.words), FIRST_WORDS))
    words = (*sentence.words[:at], word, *sentence.words[at:])
    return Sentence(words, sentence.label, (*sentence.signs[:at], 0, *sentence.signs[at:]), at)


def _checked_triggers(triggers: Sequence[str] | None, classes: int, lexicon: Mapping[str, int]) -> tuple[str, ...]:
    words = TRIGGERS[:classes] if triggers is None else tuple(triggers)
    if len({word.casefold() for word in words}) != classes or len(words) != classes:
        raise UserError(f"benchmark.triggers must name {classes} different words, one for each class, not {words}.")
    for word in words:
        if plain([word]) != word:
            raise UserError(f"benchmark.triggers: {word!r} is not one word in lower case; choose another.")
        if sign_of(word, lexicon):
            raise UserError(f"benchmark.triggers: people rated {word!r}, so that it is no shortcut; choose another.")
    return words


def _folder(root: str | Path | None) -> Path:
    folder = data_root() / DATA_SET if root is None else Path(root).expanduser()
    for file in (*DOMAINS.values(), LEXICON):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} lacks {file}; run `hansfree data get {DATA_SET}`, or name its folder as benchmark.root."
            )
    return folder


def _rated(path: Path) -> list[tuple[float, tuple[str, ...]]]:
    """Rating and words of each line. Raises ``UserError`` for an empty sentence and for a line of another form."""
    found = list[tuple[float, tuple[str, ...]]]()
    for number, line in enumerate(read_lines(path), start=1):
        try:
            _, rating, text = line.split("\t", 2)
            value, words = float(rating), tuple(text.split())
        except ValueError:
            raise UserError(f"{path}, line {number} is not a name, a rating and a sentence; mend it.") from None
        if not words:
            raise UserError(f"{path}, line {number} has an empty sentence; leave the line out.")
        found.append((value, words))
    return found


def _divided(
    sentences: list[Sentence], train: int | None, valid: int, test: int, seed: int
) -> dict[str, list[Sentence]]:
    """Parts of the sentences: those of ``iid`` and ``valid`` do not depend on how many are trained on."""
    rest = len(sentences) - test - valid
    count = rest if train is None else train
    if min(count, valid, test) < 1 or count > rest:
        raise UserError(
            f"benchmark.train, valid and test ({count}, {valid} and {test}) must be above 0 and together at most "
            f"{len(sentences)}, the film sentences that there are."
        )
    order = torch.randperm(len(sentences), generator=_generator(seed, 1)).tolist()
    parts = {
        "train": order[test + valid : test + valid + count],
        "valid": order[test : test + valid],
        "iid": order[:test],
    }
    return {name: [sentences[n] for n in part] for name, part in parts.items()}


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + stream)
