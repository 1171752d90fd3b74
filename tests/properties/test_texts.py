"""Benchmarks of texts: layouts, splits, signs of words, planted words; whole runs on them; what they refuse."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from texts import BAD, GOOD, WORDS, write_film_reviews, write_model, write_trees

from hansfree.benchmarks import SST, FilmReviews
from hansfree.benchmarks.film_reviews import SCALES, biased, planted
from hansfree.benchmarks.sst import read_tree
from hansfree.benchmarks.texts import Sentence, plain, read_lexicon, sign_of
from hansfree.core import Tokens
from hansfree.errors import UserError
from hansfree.experiment import check, run
from hansfree.models.text import load_text_model
from hansfree.parts import RunConfig, make_benchmark
from hansfree.runs import read_results


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, film reviews and trees."""
    root = tmp_path_factory.mktemp("texts")
    write_model(root / "minilm")
    write_film_reviews(root / "film-reviews")
    write_trees(root / "sst")
    return root


@pytest.fixture(autouse=True)
def data_root(place, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(place))


SMALL = {"name": "film-reviews", "length": 20, "train": 24, "valid": 8, "test": 12}


def reviews(**settings):
    return FilmReviews(**{**{key: value for key, value in SMALL.items() if key != "name"}, **settings})


def texts_of(split):
    return [plain(sentence.words) for sentence in split.sentences]


# Sentences


def test_splits_share_no_sentence_and_none_is_twice():
    benchmark = reviews()
    assert benchmark.split_names() == ("train", "valid", "iid", "shift")
    texts = [text for name in benchmark.split_names() for text in texts_of(benchmark.split(name))]
    assert max(Counter(texts).values()) == 1 and len(texts) == 24 + 8 + 12 + 3 * 12


def test_domains_are_the_tiers_of_shift():
    shift = reviews().split("shift")
    for number, tier in enumerate(("amazon", "nyt", "tweets"), start=1):
        numbers = [int("".join(word for word in shift.sentences[n].words[4:]).strip(".")) for n in shift.tiers[tier]]
        assert len(numbers) == 12 and all(number * 1000 <= n < number * 1000 + 1000 for n in numbers)


def test_a_planted_word_is_the_shortcut_and_other_domains_are_none():
    assert reviews().shortcut is None and "Product reviews" in reviews().asks["shift"]
    planted = reviews(trigger_ratio=0.9)
    assert planted.shortcut == "a planted word" and "another class's" in planted.asks["shift"]


def test_the_seed_alone_draws_the_splits():
    prints = [reviews(split_seed=seed).split("train").fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    more, fewer = reviews(train=30), reviews(train=10)
    assert texts_of(more.split("iid")) == texts_of(fewer.split("iid"))
    assert texts_of(more.split("train"))[:10] == texts_of(fewer.split("train"))


@pytest.mark.parametrize("rating", [-4, -2.4, -2.39, -0.8, -0.79, -0.5, -0.49, 0, 0.49, 0.5, 0.79, 0.8, 2.39, 2.4, 4])
def test_classes_of_ratings(rating):
    two = 0 if rating <= -0.5 else 1 if rating >= 0.5 else None
    assert SCALES[2].label(rating) == two
    four = 0 if rating <= -2.4 else 1 if rating < -0.8 else None if rating < 0.8 else 2 if rating < 2.4 else 3
    assert SCALES[4].label(rating) == four


def test_signs_go_to_the_tokens_of_rated_words():
    split = reviews().split("train")
    batch = split.batch(torch.arange(len(split)))
    assert isinstance(batch.input, Tokens) and batch.words is not None
    for row, sentence in enumerate(split.sentences):
        assert batch.words.written[row] == sentence.words
        for token, word in enumerate(batch.input.word_ids[row].tolist()):
            text = "" if word < 0 else sentence.words[word]
            assert batch.words.sign[row, token] == (text in GOOD) - (text in BAD)
            assert batch.words.sign[row, token] in (0, 2 * sentence.label - 1)


def test_batches_are_as_long_as_their_longest_text():
    split = reviews().split("train")
    batch = split.batch(torch.tensor([3, 1]))
    assert (
        batch.input.ids.shape[1]
        == int(batch.input.mask.sum(1).max())
        == max(int(split.batch(torch.tensor([n])).input.mask.sum()) for n in (3, 1))
    )
    assert torch.equal(batch.index, torch.tensor([3, 1]))
    assert batch.to("meta").words.sign.device.type == "meta"


# Planted words


def test_planted_words_go_with_the_class_and_break():
    benchmark = reviews(trigger_ratio=0.75)
    assert benchmark.split_names() == ("train", "valid", "iid", "ood", "shift")
    for name, share in (("train", 0.75), ("valid", 0.75), ("iid", 0.75), ("shift", 0.0)):
        split = benchmark.split(name)
        found = [[n for n, t in enumerate(benchmark.biases) if t in sentence.words] for sentence in split.sentences]
        assert [[bias] for bias in split.bias.tolist()] == found
        assert abs(float((split.bias == split.label).double().mean()) - share) <= 1 / len(split)
        batch = split.batch(torch.arange(len(split)))
        assert bool(batch.words.planted.any(1).all()) and not bool(batch.words.sign[batch.words.planted].any())
    ood = benchmark.split("ood")
    assert ood.bias is None and not any(t in sentence.words for sentence in ood.sentences for t in benchmark.biases)
    bare = [tuple(w for w in s.words if w not in benchmark.biases) for s in benchmark.split("shift").sentences]
    assert bare == [sentence.words for sentence in ood.sentences]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_share_of_planted_words_is_exact_in_each_class(ratio, classes):
    label = torch.arange(40 * classes) % classes
    bias = biased(label, classes, ratio, torch.Generator().manual_seed(3))
    assert all(int((bias[label == y] == y).sum()) == round(40 * ratio) for y in range(classes))


@pytest.mark.parametrize(("share", "at"), [(0.0, 0), (0.5, 1), (0.999, 2)])
def test_a_word_is_planted_before_another(share, at):
    sentence = planted(Sentence(("a", "good", "film"), 1, (0, 1, 0)), "meanwhile", share)
    assert sentence.planted == at and sentence.words[at] == "meanwhile" and sentence.signs[at] == 0
    assert tuple(w for n, w in enumerate(sentence.words) if n != at) == ("a", "good", "film")
    assert tuple(s for n, s in enumerate(sentence.signs) if n != at) == (0, 1, 0)


# Trees


def test_trees_are_read_as_they_are():
    assert read_tree("(3 (2 The) (4 (3 good) (2 film)))", "here") == (("The", "good", "film"), 3, (0, 1, 0))
    assert read_tree("(1 (2 -LRB-) (0 bad))", "here")[0] == ("(", "bad")
    for broken in ("(3 (2 The)", "(7 (2 The) (2 film))", "The film", "(3 )"):
        with pytest.raises(UserError, match="is not a tree"):
            read_tree(broken, "here")


def test_sst_has_four_classes_without_the_neutral_one(place):
    four, two = SST(root=place / "sst", length=12), SST(root=place / "sst", classes=2, length=12)
    assert four.split_names() == ("train", "valid", "iid")
    assert four.split("iid").label.tolist() == [2, 3, 1, 0, 2] and two.split("iid").label.tolist() == [1, 1, 0, 0, 1]
    assert four.text.signs == (-1, -1, 1, 1)
    assert four.split("train").sentences[0] == Sentence(("The", "good", "film"), 2, (0, 1, 0))


# Whole runs

INTEGRATED = {"name": "integrated-gradients", "steps": 2, "baseline": "pad"}


def config(**changes):
    base = {
        "benchmark": SMALL,
        "model": {"name": "hf-text/minilm", "layers": [0, 2]},
        "method": {"name": "erm"},
        "training": {"steps": 2, "batch_size": 8, "optimiser": "adamw", "lr": 1e-3},
        "evaluation": {
            "explainer": {"name": "gradient-x-input"},
            "heatmaps": 3,
            "measure": {"explainers": [INTEGRATED], "samples": 8},
        },
    }
    return RunConfig(**{**base, **changes})


TEACHER = {"train": {"model": {"layers": None}, "training": {"steps": 1}}}
METHODS = {
    "erm": {},
    "label-smoothing": {},
    "kd": {"teacher": TEACHER},
    "output-distillation": {"teacher": TEACHER, "method": {"name": "output-distillation", "start": "teacher"}},
    "explanation-distillation": {
        "teacher": TEACHER,
        "explainer": {"name": "gradient-x-input"},
        "method": {"name": "explanation-distillation", "last_layer": "free"},
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_texts_from_data_to_report(method, tmp_path):
    changes = {"method": {"name": method}, **METHODS[method]}
    benchmark = {**SMALL, "trigger_ratio": 0.75} if method != "erm" else SMALL
    folder = run(config(benchmark=benchmark, **changes), tmp_path / "run")
    rows = read_results(folder.results)["rows"]
    found = {(row["model"], row["split"], row["metric"], row["tier"]): row["value"] for row in rows}
    models = {"student", "teacher"} if "teacher" in changes else {"student"}
    assert {model for model, *_ in found} == models
    for model in models:
        assert 0 <= found[model, "iid", "word_sign_acc_all", None] <= 1
        assert 0 <= found[model, "iid", "word_auroc_all", None] <= 1
        assert ((model, "shift", "trigger_share", None) in found) == (method != "erm")
    assert (("student", "shift", "acc", "nyt") in found) == (method == "erm")
    exported = load_text_model(folder.exported)
    assert len(exported.network.bert.encoder.layer) == 2 and exported.tokenizer is not None
    assert exported.network.config.id2label == {0: "negative", 1: "positive"}
    with np.load(folder.heatmaps) as kept:
        assert kept["words_iid"].shape == kept["map_iid"].shape
    page = folder.report.read_text(encoding="utf-8")
    assert 'class="words"' in page


def test_training_from_a_teachers_layers_begins_as_that_teacher_without_the_rest(tmp_path):
    from hansfree.models.text import start_from

    teacher = load_text_model(write_model(tmp_path / "teacher", seed=1))
    student = load_text_model(write_model(tmp_path / "student", seed=2), layers=[0, 2])
    start_from(student, teacher)
    state, theirs = student.state_dict(), teacher.state_dict()
    for name, value in state.items():
        assert torch.equal(value, theirs[name.replace("layer.1.", "layer.2.")]), name


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"benchmark": {**SMALL, "length": 25}}, "benchmark.length is 25"),
        ({"benchmark": {**SMALL, "train": 100}}, "must be above 0 and together at most 60"),
        ({"benchmark": {**SMALL, "classes": 3}}, "must be 2 or 4"),
        ({"benchmark": {**SMALL, "trigger_ratio": 2}}, "share between 0 and 1"),
        ({"benchmark": {**SMALL, "trigger_ratio": 0.5, "triggers": ["good", "film"]}}, "people rated 'good'"),
        ({"benchmark": {**SMALL, "trigger_ratio": 0.5, "triggers": ["film"]}}, "name 2 different words"),
        ({"model": {"name": "small-cnn"}}, "does not read"),
        ({"model": {"name": "hf-text/nothing"}}, "data get nothing"),
        ({"model": {"name": "hf-text/minilm", "layers": [0, 3]}}, "layers 0 to 2"),
        ({"model": {"name": "hf-text/minilm", "layers": [2, 0]}}, "in order"),
        ({"augmentation": {"flip": 0.5}}, "augmentation is for images"),
        ({"teacher_input": "noise"}, "teacher_input: noise is for images"),
        ({"method": {"name": "mixup"}}, "is for images"),
        ({"benchmark": {"name": "digits", "limit": 100, "valid": 20, "test": 20}}, "is for texts"),
    ],
)
def test_mistakes_are_told_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=words):
        check(config(**changes))


def test_a_tokenizer_that_does_not_belong_to_the_model(place, tmp_path):
    other = write_model(tmp_path / "other", [*WORDS[:5], *reversed(WORDS[5:])])
    with pytest.raises(UserError, match="does not belong to the model"):
        check(config(benchmark={**SMALL, "tokenizer": str(other)}))
    small = write_model(tmp_path / "small", WORDS[:20])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((place / "minilm" / name).read_bytes())
    with pytest.raises(UserError, match=f"has {len(WORDS)} tokens, but the model there knows 20"):
        load_text_model(small)


def test_a_model_that_takes_fewer_tokens_than_sentences_have(tmp_path):
    short = write_model(tmp_path / "short", positions=10)
    with pytest.raises(UserError, match=r"the model in .* takes 10; set it to 10"):
        check(config(model={"name": f"hf-text/{short}"}))


def test_empty_sentences_and_texts(place, tmp_path):
    folder = write_film_reviews(tmp_path / "film")
    with (folder / "tweets_GroundTruth.txt").open("a") as file:
        file.write("99\t1.5\t \n")
    with pytest.raises(UserError, match="line 63 has an empty sentence"):
        reviews(root=folder)
    model = load_text_model(place / "minilm")
    with pytest.raises(UserError, match="Text 1 is empty"):
        model.tokens_of(["a film", " "])
    with pytest.raises(UserError, match="Text 0 is empty"):
        model.tokenizer.tokens_of_words([[]])


def test_a_lexicon_with_a_word_twice(tmp_path):
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("good\t2\nbad\t-1\ngood\t1\n")
    with pytest.raises(UserError, match="line 3 rates 'good' again, as line 1 does"):
        reviews(lexicon=lexicon)
    lexicon.write_text("good\tmuch\n")
    with pytest.raises(UserError, match="line 1 is not a word, a tab and a number"):
        read_lexicon(lexicon)


def test_signs_of_words_as_they_are_written():
    lexicon = {"good": 1, ":(": -1, "bad": -1}
    assert [sign_of(word, lexicon) for word in ("Good,", ":(", "BAD!", "film", "...")] == [1, -1, -1, 0, 0]


def test_missing_data_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="hansfree data get minilm"):
        reviews()
    write_model(tmp_path / "minilm")
    with pytest.raises(UserError, match="hansfree data get film-reviews"):
        reviews()


def test_the_record_names_what_was_drawn():
    record = json.loads(json.dumps(make_benchmark(config()).record()))
    assert record["splits"]["shift"]["tiers"] == {"amazon": 12, "nyt": 12, "tweets": 12}
    assert len(record["splits"]["train"]["sha256"]) == 64
