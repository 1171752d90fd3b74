"""Do attributions of words have the signs that people give these words?

Attributions of tokens become one number a word (:func:`pooled`); the words that people rated, of all sentences
together, are then a two-class problem (:func:`evidence`): a word should speak for the class that is explained where its
sign is that class's. What a mean, a ranking or a sign makes of that are the measures.

Han, Kim, Choi & Yoon, 2023, https://arxiv.org/abs/2305.15734, section 5.4, count correct predictions only and turn
signs round for negative sentences; so do ``word_auroc``, ``word_auprc`` and ``word_sign_acc``. With ``_all`` behind
the name, all predictions count; with ``_unflipped``, correct ones, but a good word should always have a positive
attribution.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hansfree.errors import unknown

Pooling = Literal["sum", "mean", "first", "largest"]


def pooled(
    map: Float[Tensor, "b length"], word_ids: Int[Tensor, "b length"], pooling: Pooling = "sum"
) -> Float[Tensor, "b words"]:
    """One number a word from those of its tokens: their sum, mean, the first, or the one of largest size.

    Not a number where a text has fewer words; tokens of no word (-1) are left out. Raises ``UserError`` for another
    pooling.
    """
    if pooling not in get_args(Pooling):
        raise unknown("pooling", pooling, get_args(Pooling))
    words = max(int(word_ids.max()) + 1, 1)
    member = word_ids.unsqueeze(1) == torch.arange(words, device=word_ids.device)[:, None]  # [b, words, length]
    values, count = map.unsqueeze(1).expand(-1, words, -1), member.sum(-1)
    if pooling in ("sum", "mean"):
        found = (values * member).sum(-1)
        found = found / count if pooling == "mean" else found
    else:
        rank = member.int() if pooling == "first" else values.abs().masked_fill(~member, -1)
        found = values.gather(2, rank.argmax(-1, keepdim=True)).squeeze(-1)
    return found.masked_fill(count == 0, torch.nan)


def evidence(
    values: Float[Tensor, "b words"], sign: Int[Tensor, "b words"], side: Int[Tensor, "b"]
) -> tuple[Float[Tensor, "rated"], Bool[Tensor, "rated"], Int[Tensor, "rated"]]:
    """Attribution, truth and sentence of each word that has a sign.

    ``side`` is the sign of the class that is explained: the truth is whether the word's is the same.
    """
    rated = (sign != 0) & ~values.isnan()
    truth = sign == side[:, None]
    sentence = torch.arange(len(values), device=values.device)[:, None].expand_as(sign)
    return values[rated], truth[rated], sentence[rated]


def word_auroc(values: Float[Tensor, "rated"], truth: Bool[Tensor, "rated"]) -> float | None:
    """The chance that a word which should speak for the class has a larger attribution than one that should not.

    Ties count half. None where all words should, or none.

    Formula. P(a_i > a_j) + P(a_i = a_j) / 2, i over true words and j over the others, of all sentences together
    Source. Han et al., 2023, table 5, https://arxiv.org/abs/2305.15734, which does not say how sentences are joined
    """
    positive = int(truth.sum())
    negative = len(truth) - positive
    if positive == 0 or negative == 0:
        return None
    ordered = values.double().sort().values
    first, last = (torch.searchsorted(ordered, values.double(), right=right) for right in (False, True))
    ranks = (first + last + 1).double() / 2
    return ((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative)).item()


def word_auprc(values: Float[Tensor, "rated"], truth: Bool[Tensor, "rated"]) -> float | None:
    """Average precision of the ranking of words by attribution; by chance it is the share of true words.

    None where no word should speak for the class.

    Formula. sum over thresholds t of (recall_t - recall_{t-1}) precision_t
    Source. Han et al., 2023, table 5, https://arxiv.org/abs/2305.15734; without interpolation, as scikit-learn has it
    """
    if not truth.any():
        return None
    values, order = values.double().sort(descending=True)
    hits = truth[order].double().cumsum(0)
    ends = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool, device=values.device)])
    precision = (hits / torch.arange(1, len(hits) + 1, device=hits.device))[ends]
    recall = hits[ends] / hits[-1]
    return (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()


def word_sign_accuracy(values: Float[Tensor, "rated"], truth: Bool[Tensor, "rated"]) -> float | None:
    """The share of words whose attribution has the right sign; zero is never right. None without words.

    Formula. mean of [a_i > 0] over true words and [a_i < 0] over the others
    Source. Han et al., 2023, "accuracy" in table 5, https://arxiv.org/abs/2305.15734
    """
    right = right_signs(values, truth)
    return right.double().mean().item() if len(right) else None


def right_signs(values: Float[Tensor, "rated"], truth: Bool[Tensor, "rated"]) -> Bool[Tensor, "rated"]:
    """Whether each attribution has the sign that it should have."""
    return torch.where(truth, values > 0, values < 0)


def trigger_share(map: Float[Tensor, "b length"], planted: Bool[Tensor, "b length"]) -> Float[Tensor, " b"]:
    """How much of the attribution is at the planted word, in [0, 1]; not a number where none was planted.

    Formula. sum over its tokens of |a_t| / sum over all tokens of |a_t|
    Source. Ours; for images it is the share of energy inside a mask
    """
    size = map.abs().double()
    share = (size * planted).sum(1) / size.sum(1)
    return share.masked_fill(~planted.any(1), torch.nan)


WORD_RANKINGS: dict[str, Callable[..., float | None]] = {"word_auroc": word_auroc, "word_auprc": word_auprc}
WORDS: dict[str, Callable[..., object]] = {
    **WORD_RANKINGS,
    "word_sign_acc": word_sign_accuracy,
    "trigger_share": trigger_share,
}
