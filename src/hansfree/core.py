"""The nouns of hansfree: Batch, Explanation, Explainer, Teacher, Classifier, Method, Stage, Benchmark.

A benchmark yields batches; a method turns a batch into named losses; an explainer tells where a model
looked; one loop minimises. A class here is abstract or final, never both.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, cast, final, get_args
from zlib import crc32

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from hansfree import backgrounds
from hansfree.errors import UserError, unknown

Draws = Mapping[str, Tensor]
"""What varies per sample and is shared by teacher and student (an epsilon, a noise, a coin): tensors of length b."""

Target = Int[Tensor, "b"] | Int[Tensor, "b k"] | Callable[[Float[Tensor, "b classes"]], Tensor]
"""The classes to explain: one or k per sample, or a rule that chooses them from the logits of the same forward pass."""

TRAINING_SPLITS = ("train", "valid")
TEST_SPLITS = ("iid", "ood", "shift")

UNKNOWN = -1
"""The label of a sample that has none: one of unrelated data, or a mixture of images."""


@dataclass(frozen=True)
class Tokens:
    """A batch of texts: token ids, the mask of real tokens, and the word that each token belongs to (-1: none).

    A real token of no word is special: it opens, closes or parts a text. Raises ``UserError`` where shapes differ.
    """

    ids: Int[Tensor, "b length"]
    mask: Bool[Tensor, "b length"]
    word_ids: Int[Tensor, "b length"]

    def __post_init__(self) -> None:
        if not self.ids.shape == self.mask.shape == self.word_ids.shape or self.ids.ndim != 2:
            shapes = [list(values.shape) for values in (self.ids, self.mask, self.word_ids)]
            raise UserError(
                f"The ids, mask and word_ids of tokens must share one shape [b, length], but theirs are {shapes}; "
                "pad the texts of a batch to one length."
            )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Words:
    """What is known of the words of a batch of texts, beside the tokens that ``Tokens.word_ids`` give them."""

    written: tuple[tuple[str, ...], ...]
    """As they stand in each text."""
    sign: Int[Tensor, "b length"]
    """Of the word that each token belongs to: 1 good, -1 bad, 0 where nobody rated it, or where there is no word."""
    planted: Bool[Tensor, "b length"]
    """The tokens of a word that was put there as a shortcut."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of a batch, one tensor per image: corners (x0, y0, x1, y1) in pixels, ends exclusive, and classes."""

    corners: tuple[Float[Tensor, "boxes 4"], ...]
    classes: tuple[Int[Tensor, "boxes"], ...]


@dataclass(frozen=True)
class Batch:
    """What a benchmark yields and a method's loss receives. Optional fields are None where the data lack them."""

    input: Float[Tensor, "b c h w"] | Tokens
    label: Int[Tensor, "b"] | Float[Tensor, "b classes"]
    index: Int[Tensor, "b"]
    """Position of each sample in its split: per-sample methods remember by it."""
    bias: Int[Tensor, "b"] | None = None
    """The spurious attribute, where known."""
    mask: Float[Tensor, "b k h w"] | None = None
    """In [0, 1]; the benchmark's ``mask_names`` say what each of the k masks shows, the first the object itself. Where
    labels are of several classes, the first shows all objects, and one for each class follows."""
    boxes: Boxes | None = None
    clean: Float[Tensor, "b c h w"] | None = None
    """The scene as an unbiased teacher sees it, pixel-aligned with ``input``."""
    view: Float[Tensor, "b 2 3"] | None = None
    """The geometric augmentation that made ``input``: replays stored maps, by ``augmentation.apply_view``."""
    mixed: Float[Tensor, "b"] | None = None
    """Share of each sample's own image where others were mixed in: nothing stored can be replayed, no label holds."""
    origin: Int[Tensor, "b"] | None = None
    """Position in the benchmark's own split, where ``index`` counts a part of it (a few shots)."""
    split: str | None = None
    """The split whose samples ``index`` counts, where a store has marked it: see :mod:`hansfree.store`."""
    words: Words | None = None
    """Of texts."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def images(self) -> Float[Tensor, "b c h w"]:
        """The input, which must be images. Raises ``UserError`` for texts."""
        if isinstance(self.input, Tokens):
            raise UserError("This method is for images, but the benchmark yields texts; choose another method.")
        return self.input

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on ``device``."""
        return dataclasses.replace(
            self, **{f.name: _moved(getattr(self, f.name), device) for f in dataclasses.fields(self)}
        )


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in cast(tuple[Any, ...], value))
    if isinstance(value, Tokens | Boxes | Words):
        return type(value)(*(_moved(getattr(value, f.name), device) for f in dataclasses.fields(value)))
    return value


class Explanation(NamedTuple):
    """One forward pass gives both: logits [b, classes] and the map, [b, c, h, w] or [b, k, c, h, w] for k targets."""

    logits: Tensor
    map: Tensor


class Drawer:
    """Mix-in of whatever needs random numbers per sample. ``draw`` is the only place where they come from."""

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draws:
        """Fresh draws for ``count`` samples, on the CPU, from ``generator`` (default: torch's own)."""
        return {}

    def fixed_draws(self, index: Int[Tensor, "b"]) -> Draws:
        """Draws that depend on the sample's index alone: what validation and evaluation use."""
        seed = crc32(type(self).__name__.encode())  # one for all would tie the epsilons of one to the coins of another
        table = self.draw(_FIXED, torch.Generator().manual_seed(seed))
        rows = index.cpu() % _FIXED
        return {name: values[rows] for name, values in table.items()}


_FIXED = 4096


class Explainer(Drawer, ABC):
    """Where a model looked. Subclasses are final frozen dataclasses whose fields are the hyper-parameters.

    Grad mode is the flag: with grad on, the map keeps its graph and can be a loss; under ``torch.no_grad()``
    it is a constant. Maps are computed in float32 or better, whatever the precision around them.
    """

    @abstractmethod
    def __call__(self, model: nn.Module, input: Any, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Explain ``model`` at ``input`` for ``target``; ``draws`` come from :meth:`draw` (None: the rule's middle).

        Every explainer takes images [b, c, h, w]; those whose signature says so take :class:`Tokens` as well, for
        a model that has ``embed`` and ``from_embeddings``, and their map is then [b, length] or [b, k, length].
        """


class TargetRule(Drawer, ABC):
    """Which class is explained, chosen from the teacher's logits (or any logits) and draws."""

    @abstractmethod
    def choose(self, logits: Float[Tensor, "b classes"], draws: Draws) -> Int[Tensor, "b"]:
        """One class per sample."""


def held_affine(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """``x * scale + shift`` in which explanations treat scale and shift as constants.

    For layers whose scale is computed from the batch or from the input (normalisation by batch statistics,
    dynamic weights): ordinarily differentiable, but an explanation follows ``x`` alone, while the gradient
    of a loss *on* the explanation still reaches scale exactly.
    """
    relevant = (x, scale) if shift is None else (x, scale, shift)
    if has_torch_function(relevant):
        return handle_torch_function(held_affine, relevant, x, scale, shift)
    return x * scale if shift is None else torch.addcmul(shift, x, scale)


@dataclass(frozen=True)
class InputSpec:
    """The shape of one input image; of a text it is one row, as long as its tokens."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class TextSpec:
    """What a model must share with a benchmark of texts."""

    vocabulary: str
    """The tokenizer's digest of which token has which number."""
    length: int
    """The most tokens that a text has."""
    signs: tuple[int, ...]
    """Of the classes: 1 good, -1 bad."""


Encoding = Literal["plain", "six-channels"]
"""How pixels become channels: as they are, or followed by their complement [x, 1 - x] as B-cos networks want."""


@final
class Classifier(nn.Module):
    """A network that takes pixels in [0, 1], prepares them inside, and shows its parts.

    logits = head(adapter(features((encode(resize(x)) - mean) / std))). Where ``size`` is None, images keep their
    size. The network speaks timm's words: ``forward_features`` (the last feature map, [b, c, h, w]),
    ``forward_head`` and ``get_classifier`` (the last linear layer). ``config`` is what
    :func:`hansfree.models.load_model` needs to build it again.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        config: Mapping[str, Any],
        *,
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
        size: tuple[int, int] | None = None,
        encoding: Encoding = "plain",
    ) -> None:
        super().__init__()
        if encoding not in get_args(Encoding):
            raise unknown("encoding", encoding, get_args(Encoding))
        self.network = network
        self.adapter: nn.Module = nn.Identity()
        self.config: dict[str, Any] = dict(config)
        self.size, self.encoding = size, encoding
        for name, values in (("mean", mean), ("std", std)):
            value = None if values is None else torch.tensor(list(values)).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def prepare(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """What the network sees of pixels in [0, 1]: resized, encoded, normalised; differentiable twice."""
        if self.size is not None and x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=self._shrinks(x))
        x = torch.cat((x, 1 - x), 1) if self.encoding == "six-channels" else x
        x = x if self.mean is None else x - self.mean
        return x if self.std is None else x / self.std

    def _shrinks(self, x: Tensor) -> bool:
        return self.size is not None and (x.shape[-2] > self.size[0] or x.shape[-1] > self.size[1])

    def forward_prepared(self, z: Tensor) -> Tensor:
        """Logits [b, classes] of what :meth:`prepare` gives."""
        if isinstance(self.adapter, nn.Identity):
            return self.network(z)
        return self.forward_head(self._features(z))

    def _features(self, z: Tensor) -> Tensor:
        return self.adapter(self._part("forward_features")(z))

    def _part(self, name: str) -> Callable[..., Any]:
        part = getattr(self.network, name, None)
        if part is None:
            raise UserError(
                f"{type(self.network).__name__} has no {name}(), which is needed to reach the last feature map; "
                "give the class forward_features, forward_head and get_classifier as timm's models have."
            )
        return part

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """The last feature map, after the adapter where there is one."""
        return self._features(self.prepare(x))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from the last feature map."""
        return self._part("forward_head")(features)

    def get_classifier(self) -> nn.Module:
        """The layer that makes the logits: linear, or in a few families a convolution."""
        return self._part("get_classifier")()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """Logits [b, classes]: :meth:`forward_prepared` of :meth:`prepare`."""
        return self.forward_prepared(self.prepare(x))


class Answer(NamedTuple):
    """What a teacher says about a batch: logits, the class that was explained, and its map."""

    logits: Tensor
    target: Tensor
    map: Tensor


TeacherInput = Literal["input", "clean", "noise", "mean", "black", "recombine"]
"""Which image a teacher gets: see :class:`LiveTeacher`."""


class Teacher(ABC):
    """Whom a method asks: a frozen value, never a submodule, never saved with the student.

    :meth:`live` computes its answers; :class:`hansfree.store.StoredTeacher` reads them.
    """

    model: nn.Module
    """The network. Raises ``UserError`` where only its answers are at hand."""
    sees: TeacherInput

    @staticmethod
    def live(model: nn.Module, sees: TeacherInput = "input") -> "LiveTeacher":
        """A teacher that computes its answers; ``model`` is frozen and put in eval mode for good."""
        if sees not in get_args(TeacherInput):
            raise unknown("teacher input", sees, get_args(TeacherInput))
        return LiveTeacher(model.eval().requires_grad_(False), sees)

    @property
    def head(self) -> nn.Module:
        """What shows the last layer: the network, or that layer alone. Raises ``UserError`` where neither is there."""
        return self.model

    @abstractmethod
    def view(self, batch: Batch) -> Float[Tensor, "b c h w"] | Tokens:
        """What the network sees of ``batch``. Raises ``UserError`` where only its answers are at hand."""

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """Logits [b, classes] alone."""

    @abstractmethod
    def answer(self, batch: Batch, explainer: Explainer, rule: TargetRule, draws: Draws) -> Answer:
        """Logits, the class that ``rule`` chooses from them, and the map of that class."""

    def drawing(self, draws: Callable[[Drawer, Batch], Draws]) -> "Teacher":
        """The same teacher with what chance decides in its own view taken from ``draws``."""
        return self

    def answerable(self, source: Drawer, draws: Draws) -> Draws:
        """The draws of ``source`` nearest to ``draws`` that this teacher can answer."""
        return draws

    def lacks(self, split: str, explainer: Explainer | None = None) -> str | None:
        """Why it cannot answer for that split, or with that explainer's maps, in one sentence; None: it can."""
        return None

    @abstractmethod
    def place(self, device: torch.device | str) -> None:
        """Move what it computes with to ``device``."""


@final
@dataclass(frozen=True)
class LiveTeacher(Drawer, Teacher):
    """A network that is asked anew each time, in eval mode and without gradients.

    ``sees`` says which image the teacher gets: the student's own ("input"), the benchmark's pixel-aligned unbiased
    twin ("clean"), or the student's own with what the first mask leaves out replaced: by uniform "noise" per pixel
    and channel, by the image's own "mean" colour (which the shortcut may have coloured), by "black", or by the
    background of another image of the batch ("recombine"; the hole that its object leaves has the mean colour
    around it, and an image alone in its batch gets noise). ``clean`` and masks are never used just because they
    exist. The teacher of a method in training draws noise and partners anew at each call; otherwise they depend
    on the sample's index (a partner also on the batch).
    """

    model: nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
    sees: TeacherInput = "input"  # pyright: ignore[reportIncompatibleVariableOverride]
    drawn: "Callable[[Drawer, Batch], Draws] | None" = field(default=None, repr=False, compare=False)
    """Where its draws come from; None: from the samples' indices."""

    def drawing(self, draws: Callable[[Drawer, Batch], Draws]) -> "LiveTeacher":
        """The same teacher with its noise and partners taken from ``draws``."""
        return dataclasses.replace(self, drawn=draws)

    def place(self, device: torch.device | str) -> None:
        """Move the network to ``device``."""
        self.model.to(device)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draws:
        """``{"background"}``, whole numbers, [count], where chance plays a part in what the teacher sees."""
        if self.sees not in ("noise", "recombine"):
            return {}
        return {"background": torch.randint(2**31, (count,), generator=generator)}

    def view(self, batch: Batch) -> Float[Tensor, "b c h w"] | Tokens:
        """What the teacher sees of ``batch``. Raises ``UserError`` where the benchmark does not give what it takes."""
        if self.sees == "input":
            return batch.input
        if self.sees == "clean":
            if batch.clean is None:
                raise UserError(
                    "The teacher should see `clean` images, but this benchmark gives none; use teacher_input: input."
                )
            return batch.clean
        if batch.mask is None:
            raise UserError(
                f"teacher_input: {self.sees} needs masks, but this benchmark gives none; use teacher_input: input."
            )
        mask = batch.mask[:, :1]
        return backgrounds.replace(batch.images, mask, self._background(batch, mask))

    def _background(self, batch: Batch, mask: Tensor) -> Tensor:
        images = batch.images
        if self.sees == "black":
            return images.new_zeros(())
        if self.sees == "mean":
            return backgrounds.mean_colour(images)
        draws = self.fixed_draws(batch.index) if self.drawn is None else self.drawn(self, batch)
        draw = draws["background"].to(images.device)
        if self.sees == "noise" or len(batch) == 1:
            _, channels, height, width = images.shape
            return backgrounds.noise(draw, channels, height, width).to(images.dtype)
        return backgrounds.filled(images, mask)[backgrounds.partner(draw)]

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Logits [b, classes] alone: one forward pass without an explanation."""
        return self.model(self.view(batch))

    @torch.no_grad()
    def answer(self, batch: Batch, explainer: Explainer, rule: TargetRule, draws: Draws) -> Answer:
        """Logits, the class that ``rule`` chooses from them, and the map of that class, from one forward pass."""
        chosen: list[Tensor] = []

        def target(logits: Tensor) -> Tensor:
            chosen.append(rule.choose(logits, draws))
            return chosen[0]

        logits, map = explainer(self.model, self.view(batch), target, draws=draws)
        return Answer(logits, chosen[0], map)


@dataclass(frozen=True)
class Predictions:
    """What a model says about a whole split, computed once; every metric reads it."""

    logits: Float[Tensor, "n classes"]
    label: Int[Tensor, "n"] | Float[Tensor, "n classes"]
    bias: Int[Tensor, "n"] | None = None
    teacher_logits: Float[Tensor, "n classes"] | None = None
    training_groups: Mapping[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    """How many training samples each group (label, bias) has."""
    tiers: Mapping[str, Int[Tensor, "_"]] = field(default_factory=dict[str, Tensor])
    """Samples of each tier, where the split has parts that are judged apart."""
    category: Int[Tensor, "classes"] | None = None
    """Number of each class's category, -1 for a class in none; None where classes form no hierarchy."""


@dataclass(frozen=True)
class Setup:
    """What a method is built from."""

    student: Callable[[], nn.Module]
    teacher: Teacher | None
    samples: int
    classes: int
    input: InputSpec
    label: Tensor | None = None
    """Of each training sample, in its split's order: what class counts and sampling weights are made from."""
    bias: Tensor | None = None
    """The same for the spurious attribute; given to methods whose ``needs`` name ``bias``, and to no others."""


@dataclass(frozen=True)
class Stage:
    """One stretch of training by the one loop. What is None or empty comes from the run's training settings."""

    name: str = "train"
    groups: Mapping[str, tuple[nn.Parameter, ...]] = field(default_factory=dict[str, tuple[nn.Parameter, ...]])
    """Parameter groups by name, each clipped apart; empty: one group of all parameters that require a gradient."""
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Training settings that differ in this stage (epochs, lr, optimiser ...): any but ``training.OF_THE_RUN``."""
    split: str = "train"
    weights: Float[Tensor, "samples"] | None = None
    """Sampling weights; None: every sample once per epoch."""


class Method(nn.Module, ABC):
    """A paper's idea as a loss. State = parameters + buffers, so checkpoint and resume come for free.

    ``forward(batch)`` is ``loss(batch)``, so that wrapping the method for several processes synchronises its
    gradients. A method never steps an optimiser.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Supervision beyond labels: of teacher, clean, bias, bias:valid, mask, boxes, mask-or-boxes, bias-model. Shown
    in every table."""
    reads_labels: bool = True
    """Whether its loss reads labels; a method that says no can be trained where there are none."""
    multi_label: ClassVar[bool] = False
    """Whether it makes sense where an image has labels of several classes, [b, classes]."""

    stages_done: Tensor

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        if "teacher" in self.needs and setup.teacher is None:
            raise UserError(
                f"{type(self).__name__} needs a teacher, but the config names none; add a `teacher` section."
            )
        self.student = setup.student()
        self._setup = setup
        self.register_buffer("stages_done", torch.zeros((), dtype=torch.long))

    @property
    def teacher(self) -> Teacher:
        """The setup's teacher, with draws by :meth:`draws`. Raises ``UserError`` where there is none."""
        if self._setup.teacher is None:
            raise UserError(f"{type(self).__name__} was asked for its teacher, but the config names none.")
        return self._setup.teacher.drawing(self.draws)

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Named terms whose sum is minimised. Pure: reads state, changes none (batch statistics apart)."""

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The loss, so that a wrapper for several processes sees it."""
        return self.loss(batch)

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Called after each training step only: group weights, running losses, memory banks, assignments."""

    def apart(self) -> dict[str, Tensor]:
        """State too large for every checkpoint: buffers that are not persistent, kept in a file for resuming alone."""
        return {}

    def predict(self, input: Any) -> Float[Tensor, "b classes"]:
        """Logits that are judged."""
        return self.student(input)

    def predictions(self, input: Any) -> dict[str, Float[Tensor, "b classes"]]:
        """Logits by model: ``student`` as :meth:`predict` gives them, and of sub-models that are reported apart."""
        return {"student": self.predict(input)}

    def networks(self) -> dict[str, nn.Module]:
        """What pictures compare, by name: the student, or sub-models and what they were made from."""
        return {"student": self.student}

    def mined(self) -> Bool[Tensor, "samples"] | None:
        """The training samples that it took for such as conflict with a shortcut; None where it looks for none."""
        return None

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Shares that it tells of each layer, by what they are and the layer's name: logged at each validation."""
        return {}

    def next_stage(self) -> Stage | None:
        """The stage to train now, or None when training is over."""
        return Stage() if self.stages_done == 0 else None

    def finish_stage(self) -> None:
        """Called by the loop when a stage is over; its position lives in a buffer, so that resuming finds it."""
        self.stages_done = self.stages_done + 1

    def place(self, device: torch.device | str) -> None:
        """Move the method to ``device``, and its teacher with it: not being a submodule, it would stay behind."""
        self.to(device)
        if self._setup.teacher is not None:
            self._setup.teacher.place(device)

    def draws(self, source: Drawer, batch: Batch) -> Draws:
        """Random draws per sample while training, fixed ones by index otherwise, on the batch's device.

        Teacher and student share them, so they are always such as the teacher can answer.
        """
        drawn = source.draw(len(batch)) if self.training else source.fixed_draws(batch.index)
        if self._setup.teacher is not None:
            drawn = self._setup.teacher.answerable(source, drawn)
        return {name: values.to(batch.index.device) for name, values in drawn.items()}


class Split(ABC):
    """One split of a benchmark, read by the batch."""

    label: Int[Tensor, "n"] | Float[Tensor, "n classes"]
    bias: Int[Tensor, "n"] | None = None
    tiers: Mapping[str, Int[Tensor, "_"]] = MappingProxyType({})
    """Samples of each tier: parts of the split that are judged apart."""

    @property
    def files(self) -> Sequence[Path] | None:
        """The image file of each sample, by which lists name it; None where samples are not made of one file each."""
        return None

    def __len__(self) -> int:
        return len(self.label)

    @abstractmethod
    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``; whatever is redrawn at each access comes from ``generator`` (None: a fixed one)."""


class Benchmark(ABC):
    """Data with a known shortcut, split so that the shortcut can be seen to break."""

    name: ClassVar[str]
    classes: tuple[str, ...]
    biases: tuple[str, ...]
    mask_names: tuple[str, ...] = ()
    """What each mask shows; the first one the object that the class is about. ``object`` and ``feature`` together are a
    truth of three bands: nothing, where the object is, and the part of it that tells its class."""
    categories: Mapping[str, str] = MappingProxyType({})
    """Category of each class that is in one, where classes form a hierarchy."""
    gives: frozenset[str] = frozenset()
    """Supervision that the batches carry: of bias, mask, boxes, clean."""
    shortcut: str | None = "a shortcut"
    """What gives the class away in training, as a report names it ("the colour"); None: nothing that is known."""
    asks: Mapping[str, str] = MappingProxyType({})
    """What a test split asks of a model, a sentence for the reader of a report, where general words would not do."""
    input: InputSpec
    text: TextSpec | None = None
    """Of benchmarks of texts."""

    @abstractmethod
    def split(self, name: str) -> Split:
        """One of train, valid, valid_ood, iid, ood, shift. Raises ``UserError`` for a split that it lacks."""

    def split_names(self) -> tuple[str, ...]:
        """The splits that exist."""
        return (*TRAINING_SPLITS, *TEST_SPLITS)

    def record(self) -> dict[str, Any]:
        """Every random choice that made the data (palettes, splits), as JSON: kept in the run folder."""
        return {}
