"""Does a model know which classes are alike? Entropy within the category of a sample's class.

A category is a set of classes that are alike (dogs; round cells). What a model gives to the others of its class's own
category, compared with its class, is what it knows of their likeness: the more even, the larger the entropy. Classes in
no category, or alone in theirs, are left out; so are samples that the model gets wrong.

The published table cannot be of a renormalised softmax, as its text has it. By the chain rule the entropy over all
classes is at least p(category) times that within; samples being right, 0.49 over all does not go with 2.90 within. A
softmax of the probabilities (instead of the logits) is nearly even whatever the model, as are the published numbers
(0.87 to 0.95 bits of 1 for two classes). Both are here, at temperature 1 and in bits; :func:`category_entropy` takes
any temperature and base. The paper averages over samples that all its models get right, here each model has its own.

Source. Han et al., On the impact of knowledge distillation for model interpretability, 2023,
https://arxiv.org/abs/2305.15734, section 4.1, tables 2 and 12.
"""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hansfree.core import Predictions
from hansfree.errors import UserError, nearest
from hansfree.metrics.accuracy import right_of
from hansfree.metrics.measure import Measure, Sums, mean_of

NONE = -1
"""The category of a class that is in none."""
IMAGENET = "imagenet"
"""What names the 67 categories of ImageNet's classes, by their WordNet ids (n02105505), for a mapping."""
IMAGENET_FILE = Path(__file__).with_name("imagenet_categories.csv")
Category = Int[Tensor, " classes"]
"""Number of the category of each class, or ``NONE``."""


@Measure
def entropy_entire(predictions: Predictions) -> Sums | None:
    """Entropy of the probabilities of all classes, in bits, of right samples whose class is in a category.

    Formula. mean of -sum_k p_k log2 p_k, p = softmax(s), over samples with argmax s = y
    Source. Han et al., 2023, https://arxiv.org/abs/2305.15734, table 2, entire
    """
    return _mean(predictions, lambda logits, members: _entropy(logits, 2.0))


@Measure
def entropy_category(predictions: Predictions) -> Sums | None:
    """Entropy of the probabilities within the category of the sample's class, renormalised, in bits, of right samples.

    Formula. mean of -sum_k q_k log2 q_k, q_k = p_k / sum_{j in C(y)} p_j for k in C(y), over samples with argmax s = y
    Source. Han et al., 2023, https://arxiv.org/abs/2305.15734, section 4.1, as its text has it
    """
    return _mean(predictions, lambda logits, members: _within(logits, members, 2.0))


@Measure
def entropy_category_double(predictions: Predictions) -> Sums | None:
    """The same of a softmax of the probabilities within the category, not of the logits, which is nearly even always.

    Formula. mean of -sum_k q_k log2 q_k, q = softmax(p_k : k in C(y)), p = softmax(s), over samples with argmax s = y
    Source. Ours, to compare with the numbers of Han et al., 2023, https://arxiv.org/abs/2305.15734, tables 2 and 12
    """
    return _mean(predictions, lambda logits, members: _within(logits.softmax(1), members, 2.0))


def category_entropy(
    logits: Float[Tensor, "n classes"],
    label: Int[Tensor, " n"],
    category: Category,
    *,
    temperature: float = 1.0,
    base: float = 2.0,
    double: bool = False,
) -> Float[Tensor, " n"]:
    """Entropy within the category of each label, of right and wrong samples alike; not a number outside of categories.

    Formula. -sum_k q_k log q_k / log base, q = softmax over k in C(y) of s_k / T; ``double``: of softmax(s / T)_k
    """
    scores = logits.double() / temperature
    members = _members(label, category)
    return _within(scores.softmax(1) if double else scores, members, base).where(members.sum(1) > 1, torch.nan)


def _mean(predictions: Predictions, entropy) -> Sums | None:
    right = right_of(predictions)
    if right is None or predictions.category is None:
        return None
    members = _members(predictions.label.clamp_min(0), predictions.category)
    values = entropy(predictions.logits.double(), members)
    return mean_of(values.where((right == 1) & (members.sum(1) > 1), torch.nan))


def _members(label: Int[Tensor, " n"], category: Category) -> Bool[Tensor, "n classes"]:
    """Which classes are in the category of each label."""
    own = category[label][:, None]
    return (category == own) & (own != NONE)


def _within(scores: Float[Tensor, "n classes"], members: Bool[Tensor, "n classes"], base: float) -> Tensor:
    return _entropy(scores.masked_fill(~members, -torch.inf), base)


def _entropy(scores: Float[Tensor, "n classes"], base: float) -> Float[Tensor, " n"]:
    return torch.special.entr(scores.softmax(1)).sum(1) / math.log(base)


# Categories ---------------------------------------------------------------------------------------------------


def numbered(classes: Sequence[str], categories: Mapping[str, str]) -> Category | None:
    """The number of each class's category; None where there are no categories.

    Raises ``UserError`` for a class that is not there, and where no category has two classes.
    """
    if not categories:
        return None
    for name in categories:
        if name not in classes:
            raise UserError(f"The categories name a class {name!r}; {nearest(name, classes)}")
    if max(Counter(categories.values()).values()) < 2:
        raise UserError("No category has two classes, so there is nothing to be alike; put two classes in one.")
    numbers = {category: number for number, category in enumerate(dict.fromkeys(categories.values()))}
    return torch.tensor([numbers[categories[name]] if name in categories else NONE for name in classes])


def category_of(
    classes: Sequence[str], own: Mapping[str, str], given: Mapping[str, str] | str | Path | None = None
) -> Category | None:
    """The number of each class's category by what is ``given``: a mapping, a file, ``imagenet``; None: by ``own``.

    ImageNet's are those of N. Eshed's thesis, which Han et al., 2023, table 14, use; classes need not be all of them.
    Raises ``UserError`` as :func:`numbered` does, and where ``imagenet`` is given and no class is a WordNet id of it.
    """
    if given != IMAGENET:
        return numbered(classes, own if given is None else categories_of(given))
    theirs = categories_of(IMAGENET_FILE)
    here = {name: theirs[name] for name in classes if name in theirs}
    if not here:
        raise UserError(
            f"categories: {IMAGENET} is for classes named by WordNet ids such as n02105505, but the first class is "
            f"{classes[0]!r}; rename them, or give a file with the columns class and category."
        )
    return numbered(classes, here)


def categories_of(given: Mapping[str, str] | str | Path) -> dict[str, str]:
    """Category by class, of a mapping or of a file of one; classes in the category ``other`` are in none."""
    found = given if isinstance(given, Mapping) else _read(given)
    return {name: category for name, category in found.items() if category != "other"}


def _read(path: str | Path) -> dict[str, str]:
    """A CSV file with the columns ``class`` and ``category``, or a YAML (or JSON) mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        found = _from_csv(text) if Path(path).suffix.lower() == ".csv" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The categories in {path} cannot be read; give a CSV or YAML file.") from error
    if not isinstance(found, dict) or not found or not all(isinstance(x, str) for pair in found.items() for x in pair):
        raise UserError(
            f"{path} must give the category of each class: a CSV file with the columns class and category, or a YAML "
            "file with lines such as komondor: dog."
        )
    return found


def _from_csv(text: str) -> dict[str, Any]:
    rows = list(csv.DictReader(text.splitlines()))
    return {row["class"]: row["category"] for row in rows if {"class", "category"} <= row.keys()}
