"""What was run, in words, from the config and the benchmark's record."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import yaml

from hansfree.report.results import Section
from hansfree.report.wording import selection

ASKED_OF_SHORTCUTS = {
    "iid": "The shortcut points to the right class as often as it did in training.",
    "ood": "The shortcut takes values that training never showed.",
    "shift": "The shortcut points to another class.",
}
TELLS_NOTHING = 0.005
"""Below this predictive power, which is written as 0.00, a shortcut is none in the training data."""
SEEN_BY_TEACHER = {
    "input": "sees what the student sees",
    "clean": "sees the unbiased twins of the images",
    "noise": "sees noise in place of the images' background",
    "mean": "sees each image's mean colour in place of its background",
    "black": "sees black in place of the images' background",
    "recombine": "sees the background of other images in place of the image's own",
}


def flat_config(config: Section) -> dict[str, Any]:
    """A suite's config in the shape of its file, where the shared settings stand beside the suite's own."""
    own = {key: value for key, value in config.items() if key != "base"}
    return {**own, **(config.get("base") or {})}


def meanings(config: Section, data: Section) -> Mapping[str, str]:
    """What each test split asks: in the words of the benchmark, or in general ones."""
    usual = (
        ASKED_OF_SHORTCUTS if shortcut(data) else {"iid": f"{_seen(config).capitalize()} that training never showed."}
    )
    return {**usual, **_told(data)["asks"]}


def shortcut(data: Section) -> str | None:
    """What gives the class away in training, as the benchmark calls it; None: nothing."""
    return _told(data)["shortcut"]


def _told(data: Section) -> Section:
    """What the benchmark says of itself; results of earlier versions do not have it."""
    some = {"iid", "ood", "shift"} & set(data.get("splits") or {}) != {"iid"}
    return data.get("told") or {"shortcut": "a shortcut" if some else None, "asks": {}}


def _seen(config: Section) -> str:
    return "texts" if str((config.get("model") or {}).get("name")).startswith("hf-text/") else "images"


def story(config: Section, data: Section, *, several: bool) -> str:
    """What was asked of the students, in a sentence or three."""
    who, they = ("The students learn", "They are") if several else ("The student learns", "It is")
    seen, cue = _seen(config), shortcut(data)
    if cue is None:
        elsewhere = " and on others" if "shift" in meanings(config, data) else ""
        tested = f"{they} then tested on {seen} that training never showed{elsewhere}."
        return f"{who} from {seen} without a planted shortcut. {tested}"
    power = (data.get("shortcut") or {}).get("train", {}).get("predictive_power")
    if power is not None and power < TELLS_NOTHING:
        tested = f"{they} then tested on new {seen} in which it tells nothing either, and on such where it does."
        return f"{who} from {seen} in which {cue} tells nothing of the class. {tested}"
    share = _aligned_share(data)
    often = "" if share in (None, 1) else f" in {100 * share:.4g} % of the cases"
    return (
        f"{who} from {seen} in which {cue} gives the class away{often}. {they} then tested where it still does, and "
        "where it does not. A model that is right for the right reasons does equally well in all of these tests."
    )


def facts_of(
    config: Section, data: Section, cells: Sequence[Section], seeds: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """What was run: (what, in words)."""
    variants = len({cell["variant"] for cell in cells})
    spelt = ", ".join(map(str, seeds))
    if 1 < len(cells) != variants * len(seeds):
        yield "Runs", f"{len(cells)} of {_count(variants, 'variant')}, seeds {spelt}; not every setting with every seed"
    elif variants > 1 or len(seeds) > 1:
        yield "Runs", f"{_count(variants, 'variant')} × {_count(len(seeds), 'seed')} ({spelt})"
    elif seeds:
        yield "Run", f"{cells[0].get('method')}, seed {spelt}"
    if config.get("benchmark"):
        told = [_section_text(config["benchmark"]) + _sizes(data), *_training_data(config)]
        yield "Data", "; ".join(told) + _differing(config, _DATA)
    if data.get("shortcut"):
        yield "Shortcut", _shortcut_text(data["shortcut"])
    teacher = config.get("teacher")
    if teacher:
        yield "Teacher", _teacher_text(teacher, config)
    if config.get("model"):
        yield "Student", _section_text(config["model"]) + _differing(config, {"model"})
    if config.get("training"):
        yield "Training", _training_text(config["training"])
    rules = dict.fromkeys(cell.get("selection") for cell in cells)
    if rules:
        yield "Weights kept", "; ".join(selection(rule) for rule in rules if rule) or "not recorded"


_DATA = {"benchmark", "transfer", "shots", "shots_seed", "augmentation"}


def _differing(config: Section, keys: AbstractSet[str]) -> str:
    """Which parts of a suite change any of the shared settings under ``keys``."""
    parts = [part for part in ("variants", "conditions") if keys & _changed(config.get(part) or {})]
    return f"; some {' and '.join(parts)} differ" if parts else ""


def _changed(part: Section) -> set[str]:
    sections = [section for section in part.values() if isinstance(section, Mapping)]
    return {key.partition(".")[0] for section in sections for key in (*section, *(section.get("grid") or {}))}


def _training_data(config: Section) -> Iterator[str]:
    """What becomes of the benchmark's training data before anything is trained on them."""
    shots = config.get("shots")
    if isinstance(shots, int):
        yield f"{_count(shots, 'training sample')} of each class"
    elif shots:
        yield f"training samples listed in {shots}"
    if config.get("transfer"):
        yield f"training and validation images are those of {_section_text(config['transfer'])}, without labels"
    if changes := list(_augmentations(config.get("augmentation") or {})):
        yield f"training images are {', '.join(changes)}, anew each time"


def _augmentations(change: Section) -> Iterator[str]:
    if crop := change.get("crop"):
        yield f"cropped to {100 * crop[0]:g} to {100 * crop[1]:g} % of their area"
    if flip := change.get("flip"):
        yield f"mirrored with probability {flip:g}"
    if rotation := change.get("rotation"):
        yield f"turned by up to {rotation:g} degrees"
    if translation := change.get("translation"):
        yield f"moved by up to {100 * translation:g} % of their side"
    for key in ("brightness", "contrast"):
        if change.get(key):
            yield f"changed in {key} by up to {100 * change[key]:g} %"
    if size := change.get("size"):
        yield f"scaled to {size} x {size} pixels"
    if mixup := change.get("mixup"):
        yield f"mixed (mixup, alpha {mixup:g})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _section_text(section: Any) -> str:
    if not isinstance(section, Mapping):
        return str(section)
    options = [_option_text(key.replace("_", " "), value) for key, value in section.items() if key != "name"]
    return f"{section.get('name', '')} ({', '.join(options)})" if options else str(section.get("name", ""))


def _option_text(name: str, value: Any) -> str:
    return f"each seed's own {name.removesuffix(' seed')}" if value == "seed" else f"{name} {plain_text(value)}"


def plain_text(value: Any) -> str:
    """A value of a config as people write it."""
    if isinstance(value, list | tuple):
        return " / ".join(map(plain_text, value))
    if isinstance(value, Mapping):
        return _section_text(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _sizes(data: Section) -> str:
    splits = data.get("splits")
    if not isinstance(splits, Mapping):
        return ""
    sizes = [
        f"{split['size']} {name}" for name, split in splits.items() if isinstance(split, Mapping) and "size" in split
    ]
    return f": {', '.join(sizes)}" if sizes else ""


def _shortcut_text(shortcut: Section) -> str:
    """How many training samples conflict with the known bias, and how much of the label it tells in each split."""
    train = shortcut.get("train") or {}
    size, conflicting = train.get("size") or 0, train.get("conflicting") or 0
    told: list[str] = []
    if size:
        told.append(f"{conflicting} of {size} training samples conflict with it ({100 * conflicting / size:.2g} %)")
    powers = [
        f"{split['predictive_power']:.2f} in {name}"
        for name, split in shortcut.items()
        if split.get("predictive_power") is not None
    ]
    if powers:
        told.append(f"its predictive power I(A; Y) / H(Y) is {', '.join(powers)}")
    return "; ".join(told)


def _aligned_share(data: Section) -> float | None:
    """The share of training images in which the shortcut points to the class; None where it is not recorded."""
    splits = data.get("splits")
    train = splits.get("train") if isinstance(splits, Mapping) else None
    if not isinstance(train, Mapping) or "aligned" not in train or not train.get("size"):
        return None
    return train["aligned"] / train["size"]


def _teacher_text(teacher: Any, config: Section) -> str:
    if not isinstance(teacher, Mapping):
        return str(teacher)
    recipe = teacher.get("train") or {}
    model = recipe.get("model") or teacher.get("model")
    if isinstance(model, Mapping) and "name" not in model:
        model = without_empty({**(config.get("model") or {}), **model})
    parts = [_section_text(model) if model else plain_text(teacher.get("path") or "")]
    if recipe:
        changes = ", ".join(f"{key} {plain_text(value)}" for key, value in recipe.items() if key != "model")
        parts.append("trained first" + (f" with {changes}" if changes else ""))
    seen = config.get("teacher_input", "input")
    parts.append(SEEN_BY_TEACHER.get(seen, f"sees {seen}"))
    return "; ".join(part for part in parts if part)


def _training_text(training: Section) -> str:
    length = [f"{training[key]} {key}" for key in ("epochs", "steps") if training.get(key)]
    named = [training.get("optimiser"), training.get("lr") and f"learning rate {training['lr']:g}"]
    rest = [training.get("schedule"), training.get("batch_size") and f"batches of {training['batch_size']}"]
    return ", ".join(str(part) for part in (*length, *named, *rest) if part)


def as_yaml(value: Any) -> str:
    """A value as YAML that reads well."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=90, default_flow_style=None)


def without_empty(config: Any) -> Any:
    """A config without the keys that are null."""
    if isinstance(config, Mapping):
        return {key: without_empty(value) for key, value in config.items() if value is not None}
    return [without_empty(value) for value in config] if isinstance(config, list | tuple) else config
