"""How models read texts: attributions of words against what people say of them, and the words that a report colours.

Every model explains the class that it chooses itself, once; its side is that class's sign. Student and teacher are
compared where they choose the same.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hansfree.core import Batch, Benchmark, Explainer, LiveTeacher, Split, Teacher, Tokens, Words
from hansfree.errors import UserError
from hansfree.measuring import Measurement, sample, together
from hansfree.methods.class_choice import Top
from hansfree.metrics.explanation_agreement import cosine, cosine_defined
from hansfree.metrics.measure import Sums, Whole, mean_of
from hansfree.metrics.words import (
    WORD_RANKINGS,
    evidence,
    pooled,
    right_signs,
    trigger_share,
)

Device = torch.device | str
AGREEMENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "explanation_cosine": cosine,
    "explanation_cosine_defined": cosine_defined,
}


class Read(NamedTuple):
    """What one model's explanations say of some texts: of each word and sentence."""

    values: Tensor
    """Attribution of each word, [n, words], summed over its tokens; not a number where a text has fewer."""
    sign: Tensor
    """Of each word."""
    side: Tensor
    """Of the class that was explained, [n]."""
    right: Tensor
    """Whether that is the label, [n]."""
    trigger: Tensor
    """Share of the attribution at the planted word, [n]."""
    chosen: Tensor
    """The class that was explained, [n]."""


def of_words(
    student: nn.Module,
    teacher: Teacher | None,
    split: Split,
    name: str,
    explainer: Explainer,
    *,
    class_signs: Sequence[int],
    measured_with: str,
    samples: int,
    batch_size: int,
    device: Device,
) -> list[Measurement]:
    """Measures of what ``explainer`` says of the words of ``samples`` sentences, the same for every model.

    In each tier too, where the split has some.
    """
    rows = _short_first(split, sample(len(split), samples))
    signs = torch.tensor(class_signs, device=device)
    models = {"student": student} | ({"teacher": teacher.model} if isinstance(teacher, LiveTeacher) else {})
    batches = [split.batch(index).to(device) for index in rows.split(batch_size)]
    seen = {model: [_read(network, batch, explainer, signs) for batch in batches] for model, network in models.items()}
    read = {model: _joined([found for found, _ in parts]) for model, parts in seen.items()}
    alike = {}
    if "teacher" in seen:
        maps = [(ours, theirs) for (_, ours), (_, theirs) in zip(seen["student"], seen["teacher"])]
        same = read["student"].chosen == read["teacher"].chosen
        for key, measure in AGREEMENT.items():
            values = torch.cat([measure(ours[:, None, None], theirs[:, None, None]) for ours, theirs in maps])
            alike[key] = values.masked_fill(~same, torch.nan)
    whole = torch.ones(len(rows), dtype=torch.bool)
    found = _measured(read, alike, whole, name, measured_with, None)
    for tier, members in split.tiers.items():
        found += _measured(read, alike, torch.isin(rows, members), name, measured_with, tier)
    return found


def _short_first(split: Split, rows: Tensor) -> Tensor:
    """The same samples by the length of their texts, so that batches hold little padding."""
    tokens, _ = _of_texts(split.batch(rows))
    return rows[tokens.mask.sum(1).argsort(stable=True)]


def _measured(
    read: dict[str, Read], alike: dict[str, Tensor], chosen: Tensor, name: str, measured_with: str, tier: str | None
) -> list[Measurement]:
    if not chosen.any():
        return []
    measured: dict[tuple[str, str], Sums | Whole | None] = {}
    for model, found in read.items():
        part = Read(*(values[chosen] for values in found))
        measured |= {(model, metric): value for metric, value in measures(part).items()}
    measured |= {("student", key): mean_of(values[chosen]) for key, values in alike.items()}
    return together(measured, name, measured_with=measured_with, tier=tier)


def measures(read: Read) -> dict[str, Sums | Whole]:
    """Every measure of words by its name; those of signs have an interval over sentences."""
    good = torch.ones_like(read.side)
    variants = {
        "": (read.right, read.side),
        "_all": (torch.ones_like(read.right), read.side),
        "_unflipped": (read.right, good),
    }
    found: dict[str, Sums | Whole] = {}
    for suffix, (counted, side) in variants.items():
        values, truth, sentence = evidence(read.values, read.sign * counted[:, None], side)
        found |= {name + suffix: Whole(rank(values, truth)) for name, rank in WORD_RANKINGS.items()}
        count = len(counted)
        found["word_sign_acc" + suffix] = _by_sentence(right_signs(values, truth), sentence, count)
        found["word_base_rate" + suffix] = _by_sentence(truth, sentence, count)
    if not read.trigger.isnan().all():
        found["trigger_share"] = mean_of(read.trigger)
    return found


def _by_sentence(hits: Tensor, sentence: Tensor, count: int) -> Sums:
    """Hits and words of each of ``count`` sentences: their ratio is the share over all words."""
    parts = torch.zeros(count, 2, dtype=torch.double)
    parts.index_add_(0, sentence, torch.stack([hits.double(), torch.ones_like(hits, dtype=torch.double)], 1))
    return Sums(parts)


def _joined(parts: list[Read]) -> Read:
    """Batches of unequal numbers of words as one."""
    most = max(part.values.shape[1] for part in parts)

    def wide(values: Tensor, fill: float) -> Tensor:
        return nn.functional.pad(values, (0, most - values.shape[1]), value=fill)

    return Read(
        torch.cat([wide(part.values, torch.nan) for part in parts]),
        torch.cat([wide(part.sign, 0) for part in parts]),
        *(torch.cat([part[field] for part in parts]) for field in range(2, 6)),
    )


@torch.no_grad()
def _read(model: nn.Module, batch: Batch, explainer: Explainer, class_signs: Tensor) -> tuple[Read, Tensor]:
    """What one model makes of a batch, and its map of the tokens."""
    tokens, words = _of_texts(batch)
    logits, map = _explained(model, batch, explainer)
    chosen = logits.argmax(1)
    values = pooled(map.double(), tokens.word_ids)
    sign = pooled(words.sign.double(), tokens.word_ids, "first").nan_to_num(0).long()
    found = values, sign, class_signs[chosen], chosen == batch.label, trigger_share(map, words.planted), chosen
    return Read(*(part.cpu() for part in found)), map.cpu()


def _explained(model: nn.Module, batch: Batch, explainer: Explainer) -> tuple[Tensor, Tensor]:
    draws = {key: value.to(batch.index.device) for key, value in explainer.fixed_draws(batch.index).items()}
    logits, map = explainer(model, batch.input, partial(Top().choose, draws={}), draws=draws)
    return logits, map


def _of_texts(batch: Batch) -> tuple[Tokens, Words]:
    if not isinstance(batch.input, Tokens) or batch.words is None:
        raise UserError("Measures of words need texts with their words, but this benchmark gives none.")
    return batch.input, batch.words


def word_maps(
    student: nn.Module,
    teacher: Teacher | None,
    benchmark: Benchmark,
    splits: tuple[str, ...],
    explainer: Explainer,
    choose: Callable[[Tensor], Tensor],
    device: Device,
) -> dict[str, Any]:
    """Words, predictions and attributions of the predicted class, for the samples that ``choose`` takes by label.

    Attributions are [count, words], summed over tokens, not a number where a text has fewer words.
    """
    arrays: dict[str, Any] = {"splits": np.array(splits), "classes": np.array(benchmark.classes)}
    student.eval()
    models = {"": student} | ({"teacher_": teacher.model} if isinstance(teacher, LiveTeacher) else {})
    for name in splits:
        split = benchmark.split(name)
        rows = choose(split.label)
        batch = split.batch(rows).to(device)
        tokens, words = _of_texts(batch)
        for prefix, model in models.items():
            with torch.no_grad():
                logits, map = _explained(model, batch, explainer)
            arrays[f"{prefix}map_{name}"] = pooled(map, tokens.word_ids).cpu().numpy()
            arrays[f"{prefix}prediction_{name}"] = logits.argmax(1).cpu().numpy()
        most = arrays[f"map_{name}"].shape[1]
        written = [[*text[:most], *[""] * (most - len(text))] for text in words.written]
        sign = pooled(words.sign.double(), tokens.word_ids, "first").nan_to_num(0)
        arrays[f"words_{name}"], arrays[f"sign_{name}"] = np.array(written), sign.long().cpu().numpy()
        arrays[f"index_{name}"], arrays[f"label_{name}"] = rows.numpy(), batch.label.cpu().numpy()
    return arrays
