"""Configs: overrides, merging, and mistakes answered with the nearest name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansfree.config import apply_overrides, construct, merge, parse, put
from hansfree.errors import UserError
from hansfree.parts import RunConfig

BASE = {
    "benchmark": {"name": "coloured-digits", "limit": 100},
    "model": {"name": "small-cnn", "norm": "none"},
    "method": {"name": "erm"},
    "training": {"epochs": 1},
}


class Thing:
    def __init__(self, *, size: int = 3, pair: tuple[float, float] | float = 1.0, given: object = None) -> None:
        self.size, self.pair, self.given = size, pair, given


def test_overrides_are_yaml_and_leave_the_original_alone():
    config = apply_overrides(BASE, ["training.epochs=5", "model.widths=[1, 2]", "explainer.name=lrp", "seed=3"])
    assert config["training"]["epochs"] == 5
    assert config["model"] == {"name": "small-cnn", "norm": "none", "widths": [1, 2]}
    assert config["explainer"] == {"name": "lrp"}
    assert BASE["training"]["epochs"] == 1


def test_a_section_that_changes_its_name_is_replaced_whole():
    same = merge(BASE, {"model": {"norm": "batch"}, "training.lr": 0.5})
    assert same["model"] == {"name": "small-cnn", "norm": "batch"}
    assert same["training"] == {"epochs": 1, "lr": 0.5}
    other = merge(BASE, {"model": {"name": "small-resnet"}})
    assert other["model"] == {"name": "small-resnet"}
    assert BASE["model"]["norm"] == "none"


@pytest.mark.parametrize("value", [3, None])
def test_a_path_through_a_value_is_refused(value):
    for lay in (
        lambda: merge({"training": value}, {"training.lr": 1}),
        lambda: put({"training": value}, "training.lr", 1),
    ):
        with pytest.raises(UserError, match="goes through 'training'"):
            lay()
    for override in ("training.lr", "=3", "training.lr=[1"):
        with pytest.raises(UserError, match=r"key=value|not valid YAML"):
            apply_overrides(BASE, [override])


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers()),
    st.dictionaries(st.sampled_from("ab"), st.integers()),
)
def test_merging_lays_the_second_over_the_first(first, second):
    assert merge(first, second) == {**first, **second}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainin": {}}, "did you mean 'training'"),
        ({"training": {"epoch": 1}}, "did you mean 'epochs'"),
        ({"teacher": {"pth": "x"}}, "did you mean 'path'"),
        ({"training": {"epochs": 0}}, r"training\.epochs cannot be 0"),
        ({"training": {"optimiser": "adm"}}, "training.optimiser"),
        ({"selection": "best"}, "selection cannot be 'best'"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(changes, said):
    with pytest.raises(UserError, match=said) as error:
        parse(RunConfig, {**BASE, **changes}, "the config x.yaml")
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="lacks the setting 'method'"):
        parse(RunConfig, {key: value for key, value in BASE.items() if key != "method"})


def test_a_thing_takes_what_its_constructor_takes():
    made = construct({"thing": Thing}, {"name": "thing", "pair": [1, 2]}, "thing", given={"given": "here"})
    assert (made.size, made.pair, made.given) == (3, (1.0, 2.0), "here")
    for section, said in (
        ({"name": "thing", "sise": 1}, "did you mean 'size'"),
        ({"name": "thing", "size": "big"}, "size cannot be 'big'"),
        ({"name": "thingy"}, "did you mean 'thing'"),
        ({"size": 1}, "needs a name"),
        ({"name": "thing", "given": 1}, "no setting 'given'"),
    ):
        with pytest.raises(UserError, match=said):
            construct({"thing": Thing}, section, "thing", given={"given": "here"})
