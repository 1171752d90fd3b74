"""Texts: explanations at the word embeddings against Captum, autograd and finite differences; loading and tokens."""

import copy
import logging

import captum.attr
import pytest
import torch
from torch import Tensor, nn

from hansfree.core import Tokens
from hansfree.errors import UserError
from hansfree.explainers import EXPLAINERS, LRP, GradientXInput, InputGradient, IntegratedGradients, LossGradient
from hansfree.models.text import TextClassifier, load_text_model, save_text_model
from hansfree.torchvision_guard import import_torchvision

import_torchvision()  # before transformers, which imports it too

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "a", "good", "film", "bad", "un", "##believ", "##able", "very"]
TEXTS = ["a very good film", "unbelievable", "a bad film"]
TARGET = torch.tensor([0, 2, 1])
SMALL = {"vocab_size": len(WORDS), "num_labels": 3}
BERT = {**SMALL, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
DISTILBERT = {**SMALL, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12}


def config(kind: str = "bert"):
    import transformers

    settings = DISTILBERT if kind == "distilbert" else BERT
    return transformers.AutoConfig.for_model(kind, **settings, pad_token_id=0, initializer_range=0.2)


def network(kind: str = "bert", attention=None) -> TextClassifier:
    torch.manual_seed(0)
    model = load_text_model(config(kind), attention=attention).double()
    model.mask_id = WORDS.index("[MASK]")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases and norms that matter
    return model


def tokens() -> Tokens:
    """The three texts, as any tokenizer for these words would code them."""
    ids = torch.tensor([[1, 5, 12, 6, 7, 2], [1, 9, 10, 11, 2, 0], [1, 5, 8, 7, 2, 0]])
    word_ids = torch.tensor([[-1, 0, 1, 2, 3, -1], [-1, 0, 0, 0, -1, -1], [-1, 0, 1, 2, -1, -1]])
    return Tokens(ids, ids > 0, word_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its tokenizer."""
    import tokenizers
    import transformers
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import BertProcessing

    inner = tokenizers.Tokenizer(WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=16, **special)
    made = tmp_path_factory.mktemp("text") / "model"
    save_text_model(load_text_model(config()), made)
    wrapped.save_pretrained(made)
    return made


# Maps.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_logits_and_padding(kind, attention):
    model, texts = network(kind, attention), tokens()
    expected = model.network(input_ids=texts.ids, attention_mask=texts.mask.long()).logits
    torch.testing.assert_close(model(texts), expected)
    for explainer in (InputGradient(), GradientXInput(), IntegratedGradients(steps=3), LossGradient()):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                logits, map = explainer(model, texts, TARGET)
            torch.testing.assert_close(logits.detach(), expected.detach())
            assert map.shape == (3, 6) and map.requires_grad == grad == logits.requires_grad
            assert map[texts.mask].all() or isinstance(explainer, IntegratedGradients)
            assert not map[~texts.mask].any()
        with torch.inference_mode():
            torch.testing.assert_close(explainer(model, texts, TARGET).map, map)


def gradients_at(model: TextClassifier, texts: Tokens, target) -> Tensor:
    embeddings = model.embed(texts).detach().requires_grad_()
    logits = model.network(inputs_embeds=embeddings, attention_mask=texts.mask.long()).logits
    return torch.autograd.grad(logits.gather(1, target[:, None]).sum(), embeddings)[0]


def test_the_gradient_of_a_token_is_its_length():
    model, texts = network(), tokens()
    expected = gradients_at(model, texts, TARGET).square().sum(-1).sqrt()
    torch.testing.assert_close(InputGradient()(model, texts, TARGET).map, expected)


def test_gradient_x_input_agrees_with_captum():
    model, texts = network(), tokens()
    layer = model.network.get_input_embeddings()

    def logits(ids, mask):
        return model.network(input_ids=ids, attention_mask=mask).logits

    theirs = captum.attr.LayerGradientXActivation(logits, layer)
    expected = theirs.attribute(texts.ids, target=TARGET, additional_forward_args=(texts.mask.long(),)).sum(-1)
    torch.testing.assert_close(GradientXInput()(model, texts, TARGET).map.detach(), expected.detach() * texts.mask)


def test_gradient_x_word_embedding_is_that_of_position_and_type_turned():
    """The norm of their sum does not see how long it is: what docs/how-to/explain-text.md warns of."""
    model, texts = network(), tokens()
    embeddings = model.network.base_model.embeddings
    length = texts.ids.shape[1]
    rest = embeddings.position_embeddings.weight[:length] + embeddings.token_type_embeddings.weight[0]
    turned = -(gradients_at(model, texts, TARGET) * rest).sum(-1)
    map = GradientXInput()(model, texts, TARGET).map
    torch.testing.assert_close(map, turned, atol=1e-8, rtol=1e-8)
    assert map.abs().max() > 1e-3


@pytest.mark.parametrize("baseline", ["pad", "mask"])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_integrated_gradients_agree_with_captum(kind, baseline):
    model, texts = network(kind), tokens()
    replaced = torch.where(texts.word_ids >= 0, WORDS.index(f"[{baseline.upper()}]"), texts.ids)

    def logits(ids, mask):
        return model.network(input_ids=ids, attention_mask=mask).logits

    theirs = captum.attr.LayerIntegratedGradients(logits, model.network.get_input_embeddings())
    settings = {"baselines": replaced, "target": TARGET, "additional_forward_args": (texts.mask.long(),), "n_steps": 6}
    expected = theirs.attribute(texts.ids, **settings).sum(-1).detach()
    found = IntegratedGradients(baseline, steps=6, chunk=7)(model, texts, TARGET).map.detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert not found[:, 0].any(), "special tokens stay as they are"


@pytest.mark.parametrize("baseline", [0.0, "pad", "mask", 0.1, lambda e: e / 2])
def test_integrated_gradients_are_complete(baseline):
    model, texts = network(), tokens()
    target = torch.stack([TARGET, (TARGET + 1) % 3], 1)
    explanation, gap = IntegratedGradients(baseline, steps=100).with_gap(model, texts, target)
    assert explanation.map.shape == (3, 2, 6) and gap.shape == (3, 2) and gap.abs().max() < 1e-6
    if baseline == 0.0:
        words = (texts.word_ids < 0)[..., None]
        start = model.from_embeddings(model.embed(texts) * words, texts)
        torch.testing.assert_close(
            explanation.map.sum(-1), (model(texts) - start).gather(1, target), rtol=1e-5, atol=1e-6
        )


def test_a_text_is_explained_alike_alone_and_in_a_batch():
    model, texts = network(), tokens()
    for explainer in (
        GradientXInput(),
        IntegratedGradients("mask", steps=3),
        InputGradient(),
        LossGradient(),
        LRP(0.05),
    ):
        together = explainer(model, texts, TARGET).map
        for n in range(3):
            length = int(texts.mask[n].sum())
            one = Tokens(*(values[n : n + 1, :length] for values in (texts.ids, texts.mask, texts.word_ids)))
            torch.testing.assert_close(explainer(model, one, TARGET[n : n + 1]).map[0], together[n, :length])


def test_lrp_reads_either_attention_alike():
    maps = [LRP(0.01)(network("bert", way), tokens(), TARGET).map for way in ("sdpa", "eager")]
    torch.testing.assert_close(maps[0], maps[1])
    assert maps[0][tokens().mask].all() and not maps[0][~tokens().mask].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "explainer",
    [InputGradient(), GradientXInput(), IntegratedGradients("mask", steps=3), LossGradient(), LRP(0.05)],
    ids=lambda explainer: type(explainer).__name__,
)
def test_gradient_of_a_loss_on_the_map(explainer, attention):
    model, texts = network("bert", attention), tokens()

    def loss() -> Tensor:
        return (explainer(model, texts, TARGET).map - 0.01).square().sum()

    parameters = dict(model.named_parameters())
    claimed = torch.autograd.grad(loss(), list(parameters.values()), materialize_grads=True)
    norm = torch.stack([g.norm() for g in claimed]).norm()
    for group in (["embeddings.word"], ["query", "key", "value"], ["LayerNorm", "dense"], ["classifier", "pooler"]):
        moved = [(p, g) for (name, p), g in zip(parameters.items(), claimed) if any(part in name for part in group)]
        directions = [g / norm + torch.randn_like(g) for _, g in moved]
        length = torch.stack([d.norm() for d in directions]).norm()
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for (parameter, _), d in zip(moved, directions):
                    parameter.add_(d, alpha=float(sign * 1e-6 / length))
            values.append(loss().item())
        with torch.no_grad():
            for (parameter, _), d in zip(moved, directions):
                parameter.add_(d, alpha=float(1e-6 / length))
        expected = sum(float((g * d).sum()) for (_, g), d in zip(moved, directions)) / float(length)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-4, abs=float(norm) * 1e-6), group


def test_a_model_without_embeddings_is_a_user_error():
    with pytest.raises(UserError, match="word embeddings"):
        GradientXInput()(nn.Linear(3, 3), tokens(), TARGET)


def test_a_baseline_that_does_not_fit_is_a_user_error():
    model = network()
    model.mask_id = None
    for baseline, words in (("mask", "mask token"), ("white", "images"), ((0.1, 0.2), "images")):
        with pytest.raises(UserError, match=words):
            IntegratedGradients(baseline)(model, tokens(), TARGET)


def test_the_model_is_left_alone():
    model, texts = network(), tokens()
    state = copy.deepcopy(model.state_dict())
    for explainer in (GradientXInput(), IntegratedGradients("mask", steps=3)):
        explainer(model, texts, TARGET)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not any(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


# Loading.


def test_a_folder_gives_the_model_and_its_tokens(folder):
    model = load_text_model(folder)
    assert not model.training and (model.pad_id, model.mask_id) == (0, 3)
    texts, expected = model.tokens_of(TEXTS), tokens()
    for found, known in zip((texts.ids, texts.mask, texts.word_ids), (expected.ids, expected.mask, expected.word_ids)):
        assert torch.equal(found, known)
    assert model.tokenizer.pieces(texts)[1] == ["[CLS]", "un", "##believ", "##able", "[SEP]"]
    again = load_text_model(folder, attention="eager")
    torch.testing.assert_close(model(texts), again(texts))
    IntegratedGradients("mask", steps=2)(model, texts, TARGET).map.sum().backward()


def test_long_texts_are_cut_only_where_that_is_said(folder):
    model = load_text_model(folder)
    with pytest.raises(UserError, match="length=16"):
        model.tokens_of(["a bad film " * 9])
    assert model.tokens_of(["a bad film " * 9, "a"], length=16).ids.shape == (2, 16)
    for wrong in ([], "a film"):
        with pytest.raises(UserError, match="list"):
            model.tokens_of(wrong)


def test_a_new_head_is_drawn_and_logged(folder, caplog):
    with caplog.at_level(logging.WARNING, "hansfree"):
        model = load_text_model(folder, num_classes=5)
    assert model(tokens()).shape == (3, 5) and "classifier.weight" in caplog.text


def test_folders_without_a_model_are_user_errors(folder, tmp_path):
    with pytest.raises(UserError, match="holds no text model"):
        load_text_model(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="safetensors"):
        load_text_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        load_text_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="tokenizer"):
        load_text_model(tmp_path).tokens_of(["a film"])


def test_a_network_that_is_another_one_from_embeddings_is_a_user_error():
    import transformers

    decoder = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, pad_token_id=0, bos_token_id=1,
                                      eos_token_id=1)  # fmt: skip
    with pytest.raises(UserError, match="word embeddings"):
        load_text_model(decoder)


def test_tokens_of_unequal_shapes_are_a_user_error():
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(UserError, match="share one shape"):
        Tokens(ids, ids[:, :2] == 0, ids)
    assert len(Tokens(ids, ids == 0, ids)) == 2


@pytest.mark.parametrize("name", ["grad-cam", "attention", "features", "bcos", "smoothgrad"])
def test_explainers_of_images_say_that_texts_are_none(name):
    with pytest.raises(UserError, match="texts"):
        EXPLAINERS[name]()(network(), tokens(), TARGET)
