"""The Stanford Sentiment Treebank: film sentences as trees whose every part people rated, in its original layout.

    (3 (2 The) (4 (3 best) (2 film)))      0 very negative ... 2 neutral ... 4 very positive

Socher et al., Recursive deep models for semantic compositionality over a sentiment treebank, 2013,
https://aclanthology.org/D13-1170. The class of a sentence is the label at its root, the truth of a word the label at
its leaf: above 2 good, below it bad. Han, Kim, Choi & Yoon, On the impact of knowledge distillation for model
interpretability, 2023, https://arxiv.org/abs/2305.15734, leave the neutral sentences out: four classes. Two classes
join the very and the simply positive or negative ones, as SST-2 does.

Layout. ``root`` holds train.txt, dev.txt and test.txt, one tree a line, or a folder ``trees`` with them.

Splits. ``train``, ``valid`` (dev) and ``iid`` (test). Phrases within sentences are not trained on. No ``ood`` and no
``shift``: film-reviews has sentences of other domains.
"""

import re
from pathlib import Path
from typing import Any, ClassVar, final

from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.film_reviews import SCALES
from hansfree.benchmarks.texts import MODEL_SET, Sentence, TextSplit, open_tokenizer, read_lines, text_split
from hansfree.core import InputSpec
from hansfree.errors import UserError

FILES = {"train": "train.txt", "valid": "dev.txt", "iid": "test.txt"}
NEUTRAL = 2
_LABELS = {4: {0: 0, 1: 1, 3: 2, 4: 3}, 2: {0: 0, 1: 0, 3: 1, 4: 1}}
_LEAF = re.compile(r"\(([0-4]) ([^()\s]+)\)")
_TREE = re.compile(r"\(([0-4]) ")
_BRACKETS = {"-LRB-": "(", "-RRB-": ")"}


@final
class SST(Divided[TextSplit]):
    """The Stanford Sentiment Treebank, sentence by sentence.

    ``root``: the folder of trees. ``classes``: 4 or 2. ``tokenizer``: a model's folder (default: that of ``hansfree
    data get minilm``), and ``length``, the most tokens, after which sentences are cut.
    """

    name: ClassVar[str] = "sst"
    biases = ()
    shortcut = None

    def __init__(
        self, *, root: str | Path, classes: int = 4, tokenizer: str | Path | None = None, length: int = 66
    ) -> None:
        if classes not in _LABELS:
            raise UserError(f"benchmark.classes must be 2 or 4, not {classes}.")
        scale = SCALES[classes]
        self.classes = scale.classes
        opened, self.text = open_tokenizer(tokenizer, length, scale.signs)
        self.input = InputSpec(1, 1, length)
        folder = Path(root).expanduser()
        folder = folder / "trees" if (folder / "trees").is_dir() else folder
        self._splits = {name: text_split(_kept(folder / file, classes), opened, length) for name, file in FILES.items()}
        self._options = {
            "root": str(root), "classes": classes, "tokenizer": str(tokenizer or MODEL_SET), "length": length
        }  # fmt: skip

    def _described(self, split: TextSplit) -> dict[str, Any]:
        return {"size": len(split), "sha256": split.fingerprint()}


def _kept(path: Path, classes: int) -> list[Sentence]:
    """The sentences of a file that are not neutral. Raises ``UserError`` where none is left."""
    trees = [read_tree(line, f"{path}, line {number}") for number, line in enumerate(read_lines(path), start=1)]
    kept = [Sentence(words, _LABELS[classes][label], signs) for words, label, signs in trees if label != NEUTRAL]
    if not kept:
        raise UserError(f"{path} has no sentence that is not neutral; each split needs some.")
    return kept


def read_tree(line: str, where: str) -> tuple[tuple[str, ...], int, tuple[int, ...]]:
    """Words, root label and signs of the words of one tree. Raises ``UserError`` for what is none."""
    root, leaves, rest = _TREE.match(line.strip()), _LEAF.findall(line), line.strip()
    while (shorter := _reduced(rest)) != rest:
        rest = shorter
    if root is None or not leaves or rest != "()":
        raise UserError(f"{where} is not a tree of labels 0 to 4, such as (3 (2 The) (4 film)); restore the file.")
    words = tuple(_BRACKETS.get(str(word), str(word)) for _, word in leaves)
    return words, int(root[1]), tuple((int(label) > NEUTRAL) - (int(label) < NEUTRAL) for label, _ in leaves)


def _reduced(text: str) -> str:
    """``text`` with each innermost part, a leaf or a pair of parts, as an empty one."""
    return re.sub(r"\([0-4] (?:\(\) \(\)|\(\)|[^()\s]+)\)", "()", text)
