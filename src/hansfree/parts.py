"""The parts of a run, built from its config: benchmark, model, explainer, method."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from hansfree.audits.dissection import ADJUSTED, IOU, QUANTILE
from hansfree.augmentation import Augmentation
from hansfree.benchmarks import BENCHMARKS
from hansfree.benchmarks.broden import read_concepts
from hansfree.benchmarks.concepts import BenchmarkConcepts, Concepts
from hansfree.benchmarks.photographs import data_root
from hansfree.benchmarks.regimes import augmented, few_shots, transferred
from hansfree.benchmarks.texts import MODEL_SET
from hansfree.config import Schema, Section, construct, inner_section, merge, parse
from hansfree.core import Benchmark, Classifier, Explainer, Method, Setup, Teacher, TeacherInput
from hansfree.errors import NotGivenError, UserError, unknown
from hansfree.evaluation import LOCALISING, Rule
from hansfree.explainers import EXPLAINERS
from hansfree.methods import METHODS
from hansfree.metrics.class_similarity import category_of
from hansfree.models import load_model
from hansfree.models.loading import imported
from hansfree.models.text import TextClassifier, load_text_model
from hansfree.report.wording import SUPERVISION
from hansfree.representations import Picture
from hansfree.store import Marked
from hansfree.training import Training


class FreezeConfig(Schema):
    """What a suite keeps of its teacher's answers about train and valid, as ``hansfree store make`` does."""

    explainers: tuple[Section, ...] = ()
    """Whose maps; as under ``explainer``."""
    epsilons: tuple[float, ...] = ()
    """Of explainers that have one; empty: their own."""
    classes: int | Literal["all"] = 1
    """Maps of so many classes of each sample, the likeliest first."""
    dtype: Literal["float32", "float16", "int8"] = "float16"


class TeacherConfig(Schema):
    """Where the teacher comes from: exactly one of ``path``, ``model`` and ``train``, or a store of its answers."""

    path: str | None = None
    """A folder that ``hansfree export`` or a run wrote."""
    model: Section | None = None
    """A model by name, as under ``model``; ``pretrained: true`` or ``weights`` make it a teacher."""
    train: Section | None = None
    """Train it first: a run of its own, described by what differs from this one."""
    store: str | None = None
    """A folder that ``hansfree store make`` wrote, asked in place of the teacher. Where ``path``, ``model`` or
    ``train`` says which teacher is meant, the store must be that teacher's."""
    seed: int | Literal["each"] = 0
    """Seed of that training; ``each``: the run's own, so that a suite trains one teacher per seed."""
    freeze: FreezeConfig | None = None
    """In a suite: ask the teacher that it trains once, and let its students read the answers."""
    statistics: Literal["running", "batch"] = "running"
    """``batch``: its normalisation uses the statistics of each batch, as some papers' code does."""


class MapsConfig(Schema):
    """Explanations to be measured, which predictions alone cannot be: agreement of maps, localisation, shifts."""

    explainers: tuple[Section, ...] = Field(min_length=1)
    """As under ``explainer``; each measures every model."""
    samples: int = Field(default=500, ge=1)
    """Per split, drawn once, the same for every model."""
    shifts: int = Field(default=0, ge=0)
    """Largest diagonal shift, in pixels, of the curve of similarity under shifts; 0: no curve. e2KD's paper: 16."""
    batch_size: int = Field(default=50, ge=1)


Share = Annotated[float, Field(gt=0, lt=1)]


class DissectionConfig(Schema):
    """Network dissection of the student: which units of a layer detect concepts that masks show."""

    layers: tuple[str, ...] = ()
    """By name; none: the last feature map."""
    split: str = "iid"
    """Whose images and masks are the concepts."""
    concepts: str | None = None
    """A folder of concepts, or Broden's, in place of the split."""
    quantiles: tuple[Share, ...] = Field(default=(QUANTILE,), min_length=1)
    iou_thresholds: tuple[Share, ...] = Field(default=(IOU,), min_length=1)
    adjusted_thresholds: tuple[Share, ...] = Field(default=(ADJUSTED,), min_length=1)


class EvaluationConfig(Schema):
    """What is measured when training is over."""

    splits: tuple[str, ...] | None = None
    """Default: all test splits of the benchmark."""
    explainer: Section = Field(default_factory=lambda: {"name": "lrp", "epsilon": 0.01})
    """Draws the heatmaps of the report, for every model alike."""
    heatmaps: int = Field(default=10, ge=0)
    """Samples per split whose heatmaps are kept."""
    measure: MapsConfig | None = None
    """Explanations to be measured; null: predictions alone."""
    dissect: DissectionConfig | None = None
    """Units to be named by concepts; null: none."""
    categories: dict[str, str] | str | None = None
    """Category of each class, for entropy within categories: a mapping, a file, ``imagenet``; null: the benchmark's."""
    pictures: tuple[Picture, ...] = ()
    """What representations look like, of at most 1,000 samples of one test split: tsne or umap (features in the plane,
    of each sub-model, coloured by class and by bias) and cka (how alike layers are)."""
    batch_size: int = Field(default=500, ge=1)


class RunConfig(Schema):
    """One run. Each named section takes what its constructor takes; see ``hansfree list``."""

    name: str | None = None
    variant: str | None = None
    """The cell's name in its suite; default: the method's name."""
    title: str | None = None
    """What people read in tables; default: the variant."""
    not_applicable: str | None = None
    """Why a table should say N/A here although the run could be made; it is not made."""
    benchmark: Section
    transfer: Section | None = None
    """A benchmark whose images replace those of training and validation, without labels; tests stay."""
    shots: Annotated[int, Field(ge=1)] | str | None = None
    """Training samples of each class, or a file that lists training images, one a line; null: all there are."""
    shots_seed: int | None = Field(default=None, ge=0)
    """Draws so many; null: the run's seed, so that intervals over seeds cover the choice of samples."""
    augmentation: Augmentation | None = None
    """Random changes of the training images."""
    model: Section
    teacher: TeacherConfig | None = None
    teacher_input: TeacherInput = "input"
    """What the teacher sees: the student's own images, the benchmark's unbiased twins (clean), or the student's images
    with the background replaced by noise, the image's mean colour, black or another image's background (recombine)."""
    method: Section
    explainer: Section | None = None
    training: Training
    selection: Rule | None = None
    """Default: iid_val_loss for methods with a teacher, else iid_val."""
    seed: int = Field(default=0, ge=0)
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _seeded(cls, config: Section) -> Section:
        return seeded(config)


def seeded(config: Mapping[str, Any]) -> Section:
    """``config`` with the run's seed for each ``split_seed: seed`` of its data, so that seeds have splits of their own.

    Raises ``UserError`` where all seeds would share a teacher, who saw the test images of some.
    """
    seed, result = config.get("seed", 0), dict(config)
    for part in ("benchmark", "transfer"):
        section = config.get(part)
        if isinstance(section, Mapping) and section.get("split_seed") == "seed":
            result[part] = {**section, "split_seed": seed}
            teacher = config.get("teacher")
            if isinstance(teacher, Mapping) and teacher.get("train") and teacher.get("seed") != "each":
                raise UserError(
                    f"{part}.split_seed: seed gives each seed a split of its own, and so each needs a teacher of its "
                    "own; set teacher.seed: each."
                )
    return result


def named(registry: Mapping[str, Any], section: Section, kind: str, **given: Any) -> Any:
    """What a section names: an entry of ``registry``, or the user's own ``package.module:Name``."""
    return construct({**registry, **_own(section, kind)}, section, kind, given=given)


def _own(section: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The user's own things that a section names, and a section of the same kind inside it."""
    name, inside = section.get("name"), inner_section(section, kind)
    own = {name: imported(name, kind)} if isinstance(name, str) and ":" in name else {}
    return own if inside is None else own | _own(inside, kind)


def named_benchmark(section: Section) -> Benchmark:
    """The benchmark that a section names, as it stands."""
    return named(BENCHMARKS, section, "benchmark")


def make_benchmark(config: RunConfig, read: Callable[[Section], Benchmark] = named_benchmark) -> Benchmark:
    """The benchmark that the config describes, with the training data that it asks for.

    ``read`` gives what a section names; one that remembers saves time where many runs have the same data.
    """
    benchmark = read(config.benchmark)
    images = benchmark if config.transfer is None else read(config.transfer)
    if config.shots is not None:
        seed = config.seed if config.shots_seed is None else config.shots_seed
        images = few_shots(images, config.shots, seed)
    benchmark = images if config.transfer is None else transferred(benchmark, images)
    check_for_texts(config, benchmark)
    benchmark = benchmark if config.augmentation is None else augmented(benchmark, config.augmentation)
    return benchmark if config.teacher is None or config.teacher.store is None else Marked(benchmark)


def check_for_texts(config: RunConfig, benchmark: Benchmark) -> None:
    """Raises ``UserError`` for settings about images where the benchmark has texts."""
    if benchmark.text is None:
        return
    settings = {
        "augmentation": config.augmentation is not None,
        "transfer": config.transfer is not None,
        f"teacher_input: {config.teacher_input}": config.teacher_input != "input",
        "teacher.store": config.teacher is not None and config.teacher.store is not None,
        "evaluation.pictures": bool(config.evaluation.pictures),
        "evaluation.dissect": config.evaluation.dissect is not None,
        "evaluation.measure.shifts": config.evaluation.measure is not None and config.evaluation.measure.shifts > 0,
    }
    for key, is_set in settings.items():
        if is_set:
            raise UserError(f"{key} is for images, but {benchmark.name} has texts; take it out.")


def make_stored_data(config: RunConfig) -> Benchmark:
    """The benchmark that a store of the config's teacher is about: every training sample, as it stands."""
    return make_benchmark(config.model_copy(update={"shots": None, "augmentation": None, "teacher": None}))


def make_category(config: RunConfig, benchmark: Benchmark) -> torch.Tensor | None:
    """The number of each class's category, where the config or the benchmark names categories."""
    return category_of(benchmark.classes, benchmark.categories, config.evaluation.categories)


def make_concepts(asked: DissectionConfig, benchmark: Benchmark) -> Concepts:
    """Images with masks of concepts: the folder that is ``asked`` for, or a split of the benchmark."""
    if asked.concepts is not None:
        return read_concepts(Path(asked.concepts), benchmark.input.height)
    if asked.split not in benchmark.split_names():
        raise unknown("split", asked.split, benchmark.split_names())
    return BenchmarkConcepts(benchmark, asked.split)


def make_explainer(section: Section | None) -> Explainer | None:
    """The explainer that a section describes."""
    return None if section is None else named(EXPLAINERS, section, "explainer")


def spelled(section: Mapping[str, Any]) -> str:
    """A section on one line: ``lrp epsilon=0.01``, ``smoothgrad explainer=(lrp epsilon=0.01)``."""
    settings = ((key, value) for key, value in section.items() if key != "name")
    return " ".join(
        [section["name"], *(f"{k}=({spelled(v)})" if isinstance(v, Mapping) else f"{k}={v}" for k, v in settings)]
    )


def make_model(section: Section, benchmark: Benchmark) -> Classifier:
    """The network of a ``model`` section, for the benchmark's classes and channels.

    Settings of our own networks stand beside the name: ``{name: small-cnn, widths: [16, 32, 64]}``.
    """
    if str(section.get("name", "")).startswith(TEXT_SOURCE):
        raise UserError(f"model.name: {section['name']} is for texts, but {benchmark.name} has images; choose another.")
    settings = ("pretrained", "stem", "mean", "std", "size", "weights", "adapter")
    options = {key: value for key, value in section.items() if key not in ("name", *settings)}
    given = {"num_classes": len(benchmark.classes), "channels": benchmark.input.channels, "options": options}
    chosen = {key: section[key] for key in settings if key in section}
    if "name" not in section:
        raise UserError("The model section needs a name, such as small-cnn or torchvision/resnet18.")
    return construct(
        {"model": load_model}, {**chosen, "name": "model"}, "model", given={"name": section["name"], **given}
    )


TEXT_SOURCE = "hf-text/"
"""Text models go by this and a folder, or the name of one below the data root."""


def make_network(section: Section, benchmark: Benchmark) -> nn.Module:
    """The network of a ``model`` section: :func:`make_model` for images, :func:`make_text_model` for texts."""
    return make_model(section, benchmark) if benchmark.text is None else make_text_model(section, benchmark)


def make_text_model(section: Section, benchmark: Benchmark) -> TextClassifier:
    """The text model of a ``model`` section: ``{name: hf-text/FOLDER, layers: [0, 2, 5], attention: eager}``.

    Raises ``UserError`` where it is none, or does not read the benchmark's tokens.
    """
    name = str(section.get("name", ""))
    if not name.startswith(TEXT_SOURCE):
        raise UserError(
            f"The benchmark {benchmark.name} has texts, which model.name: {name} does not read; write "
            f"{TEXT_SOURCE}FOLDER with a text model's folder, or {TEXT_SOURCE}{MODEL_SET}."
        )
    folder = Path(name.removeprefix(TEXT_SOURCE)).expanduser()
    if not folder.is_dir() and len(folder.parts) == 1:
        folder = data_root() / folder
        if not folder.is_dir():
            raise UserError(f"model.name: there is no {folder}; run `hansfree data get {folder.name}`.")
    given = {"source": folder, "num_classes": len(benchmark.classes)}
    model = construct({"model": load_text_model}, {**section, "name": "model"}, "model", given=given)
    check_tokens(model, benchmark, str(folder))
    return model


def read_exported(folder: str, benchmark: Benchmark) -> nn.Module:
    """The model that a run exported, for the benchmark's classes."""
    if benchmark.text is None:
        return load_model(folder, num_classes=len(benchmark.classes))
    model = load_text_model(folder)
    told = model.network.config.num_labels
    if told != len(benchmark.classes):
        raise UserError(
            f"The model in {folder} tells {told} classes apart, but the data have {len(benchmark.classes)}; use "
            "a model trained for these classes."
        )
    check_tokens(model, benchmark, folder)
    return model


def check_tokens(model: TextClassifier, benchmark: Benchmark, where: str) -> None:
    """Raises ``UserError`` where the benchmark's tokens are not the model's, or more than it takes."""
    assert benchmark.text is not None
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.vocabulary != benchmark.text.vocabulary:
        raise UserError(
            f"The tokenizer of {benchmark.name} does not belong to the model in {where}; name that folder, with its "
            "tokenizer, as benchmark.tokenizer."
        )
    if benchmark.text.length > tokenizer.limit:
        raise UserError(
            f"benchmark.length lets sentences have {benchmark.text.length} tokens, but the model in {where} takes "
            f"{tokenizer.limit}; set it to {tokenizer.limit} or less."
        )


def make_method(config: RunConfig, benchmark: Benchmark, teacher: Teacher | None) -> Method:
    """The method with its student, the student's first weights drawn from the run's seed.

    Raises ``NotGivenError`` where the benchmark does not give what the run needs.
    """
    check_needs(config, benchmark)
    check_multi_label(config, benchmark)
    torch.manual_seed(config.seed)
    train, needs = benchmark.split("train"), _needs(config.method)
    setup = Setup(
        student=lambda: make_network(config.model, benchmark),
        teacher=teacher,
        samples=len(train),
        classes=len(benchmark.classes),
        input=benchmark.input,
        label=None if config.transfer is not None else train.label,
        bias=train.bias if "bias" in needs else None,
    )
    explainer = make_explainer(config.explainer)
    given = {"setup": setup} | ({} if explainer is None else {"explainer": explainer})
    section = config.method
    name = section.get("name")
    if name in METHODS:
        explains = "explainer" in METHODS[name].__init__.__annotations__
        if explains and explainer is None:
            raise UserError(f"The method {name!r} needs an explainer; add a section such as explainer: {{name: lrp}}.")
        if explainer is not None and not explains:
            raise UserError(f"The method {name!r} takes no explainer; take the explainer section out.")
    method = named(METHODS, section, "method", **given)
    check_labels(config, method)
    return method


def needs_of(config: RunConfig) -> frozenset[str]:
    """Supervision that the run takes beyond labels: its method's, its teacher's images' and its selection rule's."""
    return frozenset(need for _, need, _ in _asked(config))


def _asked(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """(who asks, what for, what else could be done)."""
    needs = _needs(config.method)
    for need in sorted(needs):
        yield f"The method {config.method.get('name')!r}", need, "choose a benchmark that does, or another method"
    seen = {"input": None, "clean": "clean"}.get(config.teacher_input, "mask")
    if seen is not None and "teacher" in needs:
        yield f"teacher_input: {config.teacher_input}", seen, "use teacher_input: input"
    if config.selection in ("worst_group_val", "conflicting_val"):
        yield f"selection: {config.selection}", "bias:valid", "use selection: iid_val"
    if config.selection in LOCALISING:
        yield f"selection: {config.selection}", "mask-or-boxes", "use selection: iid_val"


def check_needs(config: RunConfig, benchmark: Benchmark) -> None:
    """Raises ``NotGivenError`` for the first thing that the run needs and the benchmark does not give."""
    for who, need, remedy in _asked(config):
        if not _is_given(need, benchmark):
            what = SUPERVISION.get(need, need)
            asker = "" if who.startswith("The method") else f"{who} "
            raise NotGivenError(
                f"{who} needs {what}, but the benchmark {benchmark.name} gives none; {remedy}.",
                f"{asker}needs {what}; {benchmark.name} gives none",
            )


def check_multi_label(config: RunConfig, benchmark: Benchmark) -> None:
    """Raises ``NotGivenError`` where images have labels of several classes and the method is for one."""
    if benchmark.split("train").label.ndim > 1 and not getattr(_method_class(config.method), "multi_label", False):
        raise NotGivenError(
            f"The method {config.method.get('name')!r} takes one class per image, but images of {benchmark.name} have "
            "several; choose erm, model-guidance, kd, e2kd or another distiller of logits or features.",
            "takes one class per image",
        )


def check_labels(config: RunConfig, method: Method) -> None:
    """Raises ``NotGivenError`` where training images lack what the run needs: labels, or, mixed ones, masks."""
    mixes = config.augmentation is not None and config.augmentation.mixup > 0
    kinds = {
        "unrelated": (config.transfer is not None, "take transfer out"),
        "mixed": (mixes, "set augmentation.mixup to 0"),
    }
    for kind, (asked, remedy) in kinds.items():
        if asked and method.reads_labels:
            raise NotGivenError(
                f"The method {config.method['name']!r} reads labels with these settings, but {kind} images have none; "
                f"choose a distiller that reads none, such as output-distillation, or {remedy}.",
                f"needs labels; {kind} images have none",
            )
    for need in sorted(needs_of(config) & {"bias", "mask", "boxes", "mask-or-boxes"}) if mixes else ():
        what = SUPERVISION.get(need, need)
        raise NotGivenError(
            f"This run needs {what}, but mixed images have none; set augmentation.mixup to 0.",
            f"needs {what}; mixed images have none",
        )
    rule = selection_rule(config, method)
    if config.transfer is not None and rule not in ("last", "iid_val_loss", "oracle"):
        raise UserError(
            f"selection: {rule} needs labels of validation images, but unrelated images have none; "
            "use selection: iid_val_loss or last."
        )


def _is_given(need: str, benchmark: Benchmark) -> bool:
    if need in ("teacher", "bias-model"):
        return True  # these come from the config
    if need == "mask-or-boxes":
        return bool(benchmark.gives & {"mask", "boxes"})
    if need == "bias:valid":
        return benchmark.split("valid").bias is not None
    return need in benchmark.gives and (need != "bias" or benchmark.split("train").bias is not None)


def _needs(section: Section) -> frozenset[str]:
    """The supervision that the method of a section declares."""
    return getattr(_method_class(section), "needs", frozenset())


def _method_class(section: Section) -> Any:
    """What the section names; None for a name that is not known, which is refused when the method is made."""
    name = section.get("name")
    if isinstance(name, str) and ":" in name and name not in METHODS:
        return imported(name, "method")
    return METHODS.get(name) if isinstance(name, str) else None


def selection_rule(config: RunConfig, method: Method) -> Rule:
    """The config's rule, or the default for this kind of method."""
    return config.selection or ("iid_val_loss" if "teacher" in method.needs else "iid_val")


def teacher_config(config: RunConfig) -> RunConfig:
    """The run that trains the teacher of ``config``."""
    assert config.teacher is not None and config.teacher.train is not None
    own = {"teacher", "teacher_input", "explainer", "variant", "title", "not_applicable", "selection"}
    own |= {"transfer", "shots", "shots_seed", "augmentation"}  # a teacher has all data, unless its own section differs
    base = config.model_dump(exclude=own)
    base["evaluation"]["dissect"] = None  # its layers are the student's
    seed = config.seed if config.teacher.seed == "each" else config.teacher.seed
    changes = {"seed": seed, "variant": "teacher", "method": {"name": "erm"}, **config.teacher.train}
    return parse(RunConfig, merge(base, changes), "teacher.train")
