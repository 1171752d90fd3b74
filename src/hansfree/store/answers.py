"""A teacher whose answers are read from a store, and the benchmark that tells it which samples it is asked about."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from hansfree.augmentation import apply_view
from hansfree.core import Answer, Batch, Benchmark, Drawer, Draws, Explainer, Split, TargetRule, Teacher, TeacherInput
from hansfree.errors import UserError
from hansfree.runs import difference
from hansfree.store.files import Store, decoded, open_files
from hansfree.store.identity import check_images, data_of, digest_of_model, record_of, split_epsilon

HEAD, IMAGES = "last-layer.safetensors", "images.safetensors"


def open_store(
    folder: Path | str, benchmark: Benchmark, *, sees: TeacherInput, model: nn.Module | None = None
) -> "StoredTeacher":
    """The teacher whose answers about ``benchmark`` (as it is, without augmentation) are stored in ``folder``.

    Raises ``UserError`` where the store is damaged, of other data or another order of them, of a teacher that saw
    something else than ``sees``, or of other weights than those of ``model``.
    """
    store = open_files(folder)
    about = store.about
    if about["teacher"]["sees"] != sees:
        raise UserError(
            f"The teacher of the store {folder} saw teacher_input: {about['teacher']['sees']}, but the run says "
            f"{sees}; set teacher_input so, or make another store."
        )
    if model is not None and digest_of_model(model) != about["teacher"]["sha256"]:
        raise UserError(
            f"The store {folder} was made for another teacher: the weights differ; leave out the other setting of the "
            "teacher section, or make a store of this teacher."
        )
    _check_data(store, benchmark)
    return StoredTeacher(store, benchmark.input.height, benchmark.input.width)


def _check_data(store: Store, benchmark: Benchmark) -> None:
    about = store.about
    record = record_of(benchmark)
    if record != about["record"]:
        raise UserError(
            f"The store {store.path} was made for other data ({difference(about['record'], record)}); use the "
            "benchmark it was made for, or make a store of this one."
        )
    kept = load_file(store.path / IMAGES)
    for name in store.splits:
        split = benchmark.split(name)
        if (now := data_of(split)) != about["splits"][name]:
            raise UserError(
                f"The store {store.path} was made for other data or another order ({name}: "
                f"{difference(about['splits'][name], now)}); use the data it was made for, or make a store of these."
            )
        check_images(split, kept[name], f"The store {store.path}, {name},")


# The teacher


@final
@dataclass(frozen=True, eq=False)
class StoredTeacher(Teacher):
    """Answers about the samples of the stored splits, by their index; maps go through the batch's ``view``.

    The explained class is the frozen one, chosen from the frozen logits, for teacher and student alike. Epsilons are
    those that were stored: draws are moved to the nearest of them (in the logarithm) before anybody uses them.
    Whatever was not stored raises ``UserError``: another split, explainer, setting, class or epsilon, an image that
    was mixed, and the network itself.
    """

    store: Store
    height: int
    width: int

    def __str__(self) -> str:
        return f"The store {self.store.path}"

    @property
    def sees(self) -> TeacherInput:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the teacher saw."""
        return self.store.about["teacher"]["sees"]

    @property
    def model(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Raises ``UserError``: a store has no network."""
        self._refuse_network()

    def view(self, batch: Batch) -> Tensor:
        """Raises ``UserError``: a store has no network that could see anything."""
        self._refuse_network()

    def _refuse_network(self) -> NoReturn:
        raise UserError(
            f"{self} holds the teacher's answers and not its network, which is needed here; give "
            "teacher.path, model or train in place of teacher.store, or choose a method that asks for answers alone."
        )

    @property
    def head(self) -> nn.Linear:
        """The teacher's last layer. Raises ``UserError`` where it was none that could be copied."""
        if not (self.store.path / HEAD).is_file():
            raise UserError(f"{self} holds no last layer, the teacher's not being linear; set method.last_layer: free.")
        state = load_file(self.store.path / HEAD)
        outputs, inputs = state["weight"].shape
        layer = nn.Linear(inputs, outputs, bias="bias" in state)
        layer.load_state_dict(state)
        return layer

    def place(self, device: torch.device | str) -> None:
        """Nothing to move: answers come to where the batch is."""

    def lacks(self, split: str, explainer: Explainer | None = None) -> str | None:
        """Why nothing is stored about ``split``, or by ``explainer``; None where something is."""
        if split not in self.store.splits:
            return (
                f"{self} holds answers about {', '.join(self.store.splits)} and not about {split}; "
                f"make it with --split {split}."
            )
        try:
            if explainer is not None:
                self._stored(explainer)
        except UserError as error:
            return str(error)
        return None

    def pixel_level(self, explainer: Explainer) -> bool:
        """Whether the stored maps of ``explainer`` are as fine as the image: such maps hardly outlive a crop of it."""
        name, _ = self._stored(explainer)
        return self.store.about["explanations"][name]["shape"][1:] == [self.height, self.width]

    def answerable(self, source: Drawer, draws: Draws) -> Draws:
        """``draws`` with each epsilon moved to the nearest one that is stored and within the explainer's range."""
        if "epsilon" not in draws or not isinstance(source, Explainer) or self.lacks(self.store.splits[0], source):
            return draws
        _, within = self._stored(source)
        stored = torch.tensor([epsilon for _, epsilon in within])
        nearest = (draws["epsilon"].cpu().log()[:, None] - stored.log()).abs().argmin(1)
        return {**draws, "epsilon": stored[nearest].to(draws["epsilon"])}

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The frozen logits [b, classes]. Of top-k logits, the others share the rest of the probability equally."""
        return self._logits(batch, self._rows(batch))

    @torch.no_grad()
    def answer(self, batch: Batch, explainer: Explainer, rule: TargetRule, draws: Draws) -> Answer:
        """The frozen logits, the class that ``rule`` chooses from them, and its map as ``batch.view`` shows it."""
        name, within = self._stored(explainer)
        rows = self._rows(batch)
        logits = self._logits(batch, rows)
        target = rule.choose(logits, draws)
        slots = self._epsilon_slots(within, draws, len(batch)), self._class_slots(batch, rows, target)
        kept = self.store.take(self._split(batch), f"{name}-map", rows, *slots)
        scale = None
        if self.store.about["dtype"] != "float32":
            scale = self.store.take(self._split(batch), f"{name}-scale", rows, *slots)
        return Answer(logits, target, self._replayed(decoded(kept, scale).to(logits.device), batch))

    # Which rows

    def _split(self, batch: Batch) -> str:
        if batch.split is None:
            raise UserError(f"{self} cannot tell which split this batch comes from; read it from Marked(benchmark).")
        if (reason := self.lacks(batch.split)) is not None:
            raise UserError(reason)
        return batch.split

    def _rows(self, batch: Batch) -> np.ndarray:
        split = self._split(batch)
        if batch.mixed is not None:
            raise UserError(
                f"{self} holds no answers about mixed images; set augmentation.mixup: 0, or use a live teacher."
            )
        rows = (batch.index if batch.origin is None else batch.origin).cpu().numpy()
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.store.rows(split):
            raise UserError(
                f"{self} has {self.store.rows(split)} rows of {split}, but the batch asks for row "
                f"{rows.max() if rows.min() >= 0 else rows.min()}; use the data it was made for."
            )
        if not np.array_equal(self.store.take(split, "label", rows), batch.label.cpu().numpy()):
            raise UserError(f"{self} has other labels for these samples of {split}; use the data it was made for.")
        return rows

    def _logits(self, batch: Batch, rows: np.ndarray) -> Float[Tensor, "b classes"]:
        about, split = self.store.about, self._split(batch)
        logits = torch.from_numpy(self.store.take(split, "logits", rows)).float()
        if about["top_logits"] is not None:
            rest = torch.from_numpy(self.store.take(split, "logits-rest", rows))
            top = torch.from_numpy(self.store.take(split, "logits-class", rows)).long()
            logits = rest[:, None].repeat(1, about["classes"]).scatter(1, top, logits)
        return logits.to(batch.index.device)

    # Which map

    def _stored(self, explainer: Explainer) -> tuple[str, list[tuple[int, float]]]:
        """The field's name, and slot and value of each stored epsilon that ``explainer`` may use."""
        settings, asked = split_epsilon(explainer)
        explanations: Mapping[str, Any] = self.store.about["explanations"]
        for name, told in explanations.items():
            if told["explainer"] == settings:
                return name, self._within(told["epsilons"] or [], asked, settings["name"])
        held = ", ".join(explanations) or "none at all"
        same = next((t["explainer"] for t in explanations.values() if t["explainer"]["name"] == settings["name"]), None)
        why = f" with these settings ({difference(same, settings)})" if same else ""
        raise UserError(
            f"{self} holds no maps of {settings['name']}{why}, only of: {held}; make it with this --explainer."
        )

    def _within(self, stored: list[float], asked: Any, name: str) -> list[tuple[int, float]]:
        low, high = asked if isinstance(asked, tuple) else (asked, asked)
        within = [(slot, epsilon) for slot, epsilon in enumerate(stored) if low <= epsilon <= high]
        if asked is not None and not within:
            raise UserError(
                f"{self} holds {name} for epsilon {', '.join(map(str, stored))} and not for "
                f"{asked}; use one of these, or make it with --epsilon."
            )
        return within

    def _epsilon_slots(self, within: list[tuple[int, float]], draws: Draws, count: int) -> np.ndarray:
        if not within:
            return np.zeros(count, np.int64)
        slots = np.array([slot for slot, _ in within])
        if "epsilon" not in draws:
            if len(within) > 1:
                raise UserError(
                    f"{self} holds several epsilons and nothing says which one; draw them with "
                    "Method.draws, or fix the explainer's epsilon."
                )
            return slots.repeat(count)
        stored = torch.tensor([epsilon for _, epsilon in within])
        equal = draws["epsilon"].cpu().float()[:, None] == stored
        if not equal.any(1).all():
            raise UserError(
                f"{self} holds epsilon {', '.join(str(e) for _, e in within)}, but another was "
                "drawn; draw them with Method.draws, which knows those that are stored."
            )
        return slots[equal.int().argmax(1).numpy()]

    def _class_slots(self, batch: Batch, rows: np.ndarray, target: Int[Tensor, "b"]) -> np.ndarray:
        equal = self.store.take(self._split(batch), "class", rows) == target.cpu().numpy()[:, None]
        if not equal.any(1).all():
            count = self.store.about["top_classes"]
            held = "the top class" if count == 1 else f"the top {count} classes"
            raise UserError(
                f"{self} holds maps of {held} of each sample, but the method explains others too; make it with "
                "--classes all, or let the method explain the top class alone (method.top_probability: 1)."
            )
        return equal.argmax(1)

    def _replayed(self, map: Float[Tensor, "b c h w"], batch: Batch) -> Float[Tensor, "b c h w"]:
        height, width = batch.images.shape[-2:]
        if batch.view is None:
            if (height, width) != (self.height, self.width):
                raise UserError(
                    f"{self} was made from images of {self.height} x {self.width} pixels, but these "
                    f"are {height} x {width} and no view says how they came about; use augmentation.size."
                )
            return map
        size = max(1, round(map.shape[-2] * height / self.height)), max(1, round(map.shape[-1] * width / self.width))
        return apply_view(map, batch.view, size)


# The data


@final
@dataclass(frozen=True, eq=False)
class MarkedSplit(Split):
    """A split whose batches say which one it is."""

    whole: Split
    name: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.whole.label)
        object.__setattr__(self, "bias", self.whole.bias)
        object.__setattr__(self, "tiers", self.whole.tiers)

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, marked."""
        return dataclasses.replace(self.whole.batch(index, generator), split=self.name)


@final
class Marked(Benchmark):
    """A benchmark whose batches say which split they come from: what a stored teacher needs to find its rows."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.whole = benchmark
        self.name = benchmark.name  # pyright: ignore[reportAttributeAccessIssue]
        self.classes, self.biases, self.mask_names = benchmark.classes, benchmark.biases, benchmark.mask_names
        self.categories = benchmark.categories
        self.gives, self.input = benchmark.gives, benchmark.input

    def split(self, name: str) -> MarkedSplit:
        """As the benchmark's, marked."""
        return MarkedSplit(self.whole.split(name), name)

    def split_names(self) -> tuple[str, ...]:
        """The benchmark's."""
        return self.whole.split_names()

    def record(self) -> dict[str, Any]:
        """The benchmark's."""
        return self.whole.record()
