"""What a suite tries: variants under conditions, grids of settings, and which setting of a grid is chosen.

Nothing runs here. A variant is one method with its settings; a condition changes something for all of them (the number
of training samples, the teacher); a grid tries several settings of a variant, one of which is chosen under each
condition by validation data alone.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Self

from pydantic import Field, model_validator

from hansfree.config import Schema, Section, parse
from hansfree.errors import UserError, nearest
from hansfree.evaluation import Rule
from hansfree.parts import RunConfig
from hansfree.report.results import headline_metric

Row = Mapping[str, Any]


class SuiteConfig(Schema):
    """Named variants times conditions times seeds. Every other key of the file is a run's, shared by all of them."""

    name: str
    title: str | None = None
    description: str | None = None
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    reference: str | None = None
    """The variant that the others are compared with, seed by seed and within each condition."""
    variants: dict[str, Section] = Field(min_length=1)
    """What differs from the shared settings; keys may be dotted. ``grid: {training.lr: [0.01, 0.03]}`` tries each, and
    of several keys every combination; ``conditions: [a, b]`` leaves the other conditions out."""
    conditions: dict[str, Section] = Field(default_factory=dict[str, Section])
    """Every variant is run under each, with what differs laid over it; none: as it stands."""
    tuning_seeds: tuple[int, ...] | None = None
    """Of the seeds, those that try all settings of a grid; the others run the chosen one alone. None: all seeds try
    all."""
    within: float = Field(default=0.1, ge=0)
    """A grid's setting is admitted if its validation accuracy is at most this far below the teacher's."""
    base: Section
    """The shared settings."""

    @model_validator(mode="after")
    def _tuned_on_own_seeds(self) -> Self:
        if self.tuning_seeds is not None and not (self.tuning_seeds and set(self.tuning_seeds) <= set(self.seeds)):
            raise ValueError("tuning_seeds must be some of the seeds")
        return self

    @property
    def tuned_on(self) -> tuple[int, ...]:
        """The seeds that choose a grid's setting."""
        return self.seeds if self.tuning_seeds is None else self.tuning_seeds


@dataclass(frozen=True)
class Planned:
    """One variant under one condition with one setting of its grid."""

    name: str
    title: str
    family: str
    """The variant's own name, without condition and setting."""
    condition: str | None
    setting: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The dotted keys of the grid; empty where there is none."""
    changes: Section = field(default_factory=dict[str, Any])


def read_suite(config: Section) -> SuiteConfig:
    """The suite in a config file's mapping."""
    own = {name for name in SuiteConfig.model_fields if name != "base"}
    known = own | set(RunConfig.model_fields)
    for key in config:
        if key not in known:
            raise UserError(f"The suite has no setting {key!r}; {nearest(key, known)}")
    shared = {key: value for key, value in config.items() if key not in own}
    suite = parse(SuiteConfig, {**{k: v for k, v in config.items() if k in own}, "base": shared}, "the suite")
    names = [planned.name for planned in plan(suite)]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"Two variants of the suite would both be called {twice[0]!r}; rename one, or mend its grid.")
    known_variants = dict.fromkeys([*suite.variants, *names])
    if suite.reference is not None and suite.reference not in known_variants:
        raise UserError(
            f"The suite's reference {suite.reference!r} is no variant; {nearest(suite.reference, known_variants)}"
        )
    return suite


def plan(suite: SuiteConfig) -> list[Planned]:
    """Everything that is tried: ``lrp`` over two learning rates is ``lrp lr=0.01`` and ``lrp lr=0.03``, and under the
    condition ``few`` it is ``lrp lr=0.01 @ few`` and so on."""
    return [
        planned
        for condition in suite.conditions or [None]
        for name, variant in suite.variants.items()
        if condition in _conditions(suite, name)
        for planned in _settings(suite, name, variant, condition)
    ]


def selected(suite: SuiteConfig, names: Collection[str]) -> list[Planned]:
    """What is planned of the variants, and under the conditions, in ``names``; of a kind that is not named, of all.

    A variant stands for every setting of its grid. Raises ``UserError`` for an unknown name, and where nothing is left.
    """
    known = {**suite.variants, **suite.conditions}
    for name in names:
        if name not in known:
            raise UserError(f"--only: the suite has no variant or condition {name!r}; {nearest(name, known)}")
    variants = suite.variants.keys() & names or suite.variants.keys()
    conditions = suite.conditions.keys() & names or {*suite.conditions, None}
    found = [one for one in plan(suite) if one.family in variants and one.condition in conditions]
    if not found:
        raise UserError(f"--only: the suite runs none of {', '.join(names)} together; see the variants' conditions.")
    return found


def _conditions(suite: SuiteConfig, name: str) -> Collection[str | None]:
    every = list(suite.conditions) or [None]
    chosen = suite.variants[name].get("conditions", every)
    for condition in chosen:
        if condition not in every:
            known = nearest(str(condition), suite.conditions)
            raise UserError(f"variants.{name}.conditions: {condition!r} is no condition; {known}")
    return chosen


def _settings(suite: SuiteConfig, name: str, variant: Section, condition: str | None) -> Iterator[Planned]:
    """The settings of a variant under a condition, which has the last word on what both change."""
    own = {key: value for key, value in variant.items() if key not in ("grid", "title", "conditions")}
    over = dict(suite.conditions[condition]) if condition else {}
    titles = [variant.get("title", name), over.pop("title", condition)]
    for setting in _grid(name, variant):
        cell = " ".join([name, *(f"{_short(key)}={value}" for key, value in setting.items())])
        yield Planned(
            name=cell if condition is None else f"{cell} @ {condition}",
            title=", ".join(filter(None, [titles[0], _spelt(setting), titles[1]])),
            family=name,
            condition=condition,
            setting=setting,
            changes={**own, **setting, **over},
        )


def _grid(name: str, variant: Section) -> list[dict[str, Any]]:
    """Every combination of a grid's values; one empty setting where there is no grid."""
    grid: Any = variant.get("grid", {})
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise UserError(f"variants.{name}.grid must give each key a list of values: {{training.lr: [0.01, 0.03]}}.")
    return [dict(zip(grid, values)) for values in product(*grid.values())]


# Choosing -----------------------------------------------------------------------------------------------------


def families(planned: Iterable[Planned]) -> dict[tuple[str | None, str], list[Planned]]:
    """What was planned by (condition, variant): each is one row of a table, whatever its grid."""
    found: dict[tuple[str | None, str], list[Planned]] = {}
    for one in planned:
        found.setdefault((one.condition, one.family), []).append(one)
    return found


def grids(
    suite: SuiteConfig,
    planned: Iterable[Planned],
    rows: Iterable[Row],
    rules: Mapping[str, Rule],
    teachers: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """Each grid with its choice, from validation rows of the tuning seeds.

    ``rules`` are the variants' selection rules, ``teachers`` what their teachers' rows are filed under (default:
    teacher). What a rule looks at to choose a checkpoint it looks at to choose a setting. Settings count that finished
    for every tuning seed; first those whose validation accuracy is at most ``within`` below the teacher's, or if there
    are none (``admitted`` is false in all) the one that is nearest to it. Where labels are unknown, all are admitted.
    Where they are of several classes, F1 stands for accuracy.
    """
    rows = [row for row in rows if row["group"] is row.get("tier") is None and row["split"] in ("valid", "valid_ood")]
    own = headline_metric(rows)
    ours = [row for row in rows if row.get("seed") in suite.tuned_on]
    for (condition, _), members in families(planned).items():
        if not members[0].setting:
            continue
        mark = _mean(rows, teachers.get(members[0].name, "teacher"), own, "valid")
        rule = rules.get(members[0].name, "iid_val_loss")
        split, metric, sign, words = _LOOKS_AT[rule]
        metric = own if metric == "acc" else metric

        def mean(name: str, metric: str, split: str = "valid") -> float | None:
            return _mean(ours, name, metric, split, len(suite.tuned_on))

        settings = [
            {
                "variant": one.name,
                "value": next(iter(one.setting.values())) if len(one.setting) == 1 else _spelt(one.setting),
                "valid_loss": mean(one.name, "loss"),
                "valid_acc": mean(one.name, own),
                "score": mean(one.name, metric, split),
            }
            for one in members
        ]
        for setting in settings:
            finished, acc = setting["valid_loss"] is not None, setting["valid_acc"]
            setting["admitted"] = finished and (acc is None or mark is None or acc >= mark - suite.within)
        best = _best(settings, sign)
        yield {
            "method": _common_title(members),
            "condition": condition,
            "key": " and ".join(members[0].setting),
            "rule": f"{words} on average over {_seeds(suite)}, among settings whose validation accuracy is at most "
            f"{100 * suite.within:g} points below the teacher's; if there are none, the highest validation accuracy; "
            "nothing else was looked at",
            "settings": [{**setting, "chosen": setting is best} for setting in settings],
        }


_LOOKS_AT: dict[Rule, tuple[str, str, int, str]] = {
    "iid_val": ("valid", "acc", 1, "the highest validation accuracy (of equals the lowest validation loss)"),
    "iid_val_loss": ("valid", "loss", -1, "the lowest validation loss of the method's own"),
    "last": ("valid", "loss", -1, "the lowest validation loss of the method's own"),
    "worst_group_val": ("valid", "acc_wg", 1, "the highest accuracy of the worst validation group"),
    "conflicting_val": ("valid", "acc_bc", 1, "the highest accuracy on conflicting validation samples"),
    "epg_val": ("valid", "epg", 1, "the highest EPG of validation explanations"),
    "iou_val": ("valid", "iou", 1, "the highest IoU of validation explanations"),
    "ood_val": ("valid_ood", "acc", 1, "the highest accuracy on unbiased validation images"),
    "oracle": ("valid", "loss", -1, "the lowest validation loss of the method's own"),
}
"""Where a rule looks when it chooses a setting: split, metric, which sign is better, and in words."""


def _best(settings: list[dict[str, Any]], sign: int) -> dict[str, Any] | None:
    able = [s for s in settings if s["admitted"] and s["score"] is not None]
    if able:
        return max(able, key=lambda s: (sign * s["score"], -_or_zero(s["valid_loss"])))
    return max((s for s in settings if s["valid_acc"] is not None), key=lambda s: s["valid_acc"], default=None)


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value


def _spelt(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{_short(key)} {value}" for key, value in setting.items())


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _seeds(suite: SuiteConfig) -> str:
    return "the seeds" if suite.tuning_seeds is None else "the tuning seeds " + ", ".join(map(str, suite.tuning_seeds))


def _common_title(members: list[Planned]) -> str:
    return members[0].title.replace(f", {_spelt(members[0].setting)}", "", 1)


def _mean(rows: Iterable[Row], variant: str, metric: str, split: str, at_least: int = 1) -> float | None:
    wanted = {"variant": variant, "metric": metric, "split": split}
    values = [row["value"] for row in rows if all(row[key] == value for key, value in wanted.items())]
    return sum(values) / len(values) if len(values) >= at_least else None


def chosen_of(found: Iterable[Row]) -> dict[str, str]:
    """The chosen setting's variant, by the name of any variant of its grid; grids without a choice are left out."""
    choices: dict[str, str] = {}
    for grid in found:
        chosen = next((s["variant"] for s in grid["settings"] if s["chosen"]), None)
        choices |= {s["variant"]: chosen for s in grid["settings"] if chosen is not None}
    return choices


def reference_under(
    suite: SuiteConfig, planned: Iterable[Planned], condition: str | None, choices: Mapping[str, str]
) -> str | None:
    """The variant that others are compared with under a condition: of a grid the chosen setting."""
    if suite.reference is None:
        return None
    own = [one.name for one in planned if one.condition == condition and one.family == suite.reference]
    return suite.reference if not own else choices.get(own[0], own[0])


def curves(planned: Iterable[Planned]) -> Iterator[dict[str, Any]]:
    """Shift accuracy against the number that a grid varies, one picture per key and condition."""
    series: dict[tuple[str | None, str], dict[str, list[list[Any]]]] = {}
    for (condition, _), members in families(planned).items():
        values = [value for one in members for value in one.setting.values()]
        if len(members[0].setting) == 1 and all(isinstance(value, int | float) for value in values):
            key = next(iter(members[0].setting))
            points = [[one.name, value] for one, value in zip(members, values)]
            series.setdefault((condition, key), {})[_common_title(members)] = points
    for (condition, key), lines in series.items():
        under = "" if condition is None else f", {condition}"
        title = f"Shift accuracy against {_WORDS.get(key, key)}{under}"
        yield {"title": title, "key": key, "metric": "acc", "split": "shift", "series": lines}


_WORDS = {"training.lr": "learning rate", "training.epochs": "epochs", "training.steps": "steps"}
