"""Text classifiers of Hugging Face's transformers, with the word embeddings where explainers take their gradient.

Everything is local: a folder with ``config.json``, safetensors and a tokenizer, or a configuration whose weights are
drawn at random. Encoders such as BERT, MiniLM, DistilBERT, RoBERTa and ELECTRA work, with either attention.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hansfree.core import Tokens
from hansfree.errors import UserError
from hansfree.models.sources import needs_classes, one_line, package, sound_options
from hansfree.torchvision_guard import import_torchvision

Attention = Literal["sdpa", "eager"]

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer that makes :class:`~hansfree.core.Tokens`, with the word of each token."""

    inner: Any
    limit: int
    """The most tokens that the model takes."""

    def tokens_of(self, texts: Sequence[str], *, length: int | None = None) -> Tokens:
        """Texts as tokens, padded on the right to the longest of them; ``length`` cuts longer ones off.

        Raises ``UserError`` for no text at all, and for one that is longer than the model takes where no length says
        that it may be cut.
        """
        if isinstance(texts, str) or not texts:
            raise UserError(f"Texts must be a list with at least one string, but got {texts!r}.")
        coded = self.inner(
            list(texts), padding=True, padding_side="right", truncation=length is not None, max_length=length
        )
        ids = torch.tensor(coded["input_ids"])
        if ids.shape[1] > self.limit:
            raise UserError(
                f"A text has {ids.shape[1]} tokens, but the model takes {self.limit}; give length={self.limit} to "
                "have longer texts cut off."
            )
        words = [[-1 if word is None else word for word in coded.word_ids(n)] for n in range(len(texts))]
        return Tokens(ids, torch.tensor(coded["attention_mask"]).bool(), torch.tensor(words))

    def pieces(self, tokens: Tokens) -> list[list[str]]:
        """What each token stands for, text by text and without the padding."""
        rows = zip(tokens.ids.tolist(), tokens.mask.tolist())
        return [self.inner.convert_ids_to_tokens([id for id, real in zip(*row) if real]) for row in rows]


@final
class TextClassifier(nn.Module):
    """A Hugging Face sequence classifier: tokens go in, logits come out, by way of its word embeddings.

    Position and type embeddings belong to the network behind :meth:`from_embeddings`. ``pad_id`` and ``mask_id`` are
    the tokens that an explainer's baseline may be made of, None where there is no such token.
    """

    def __init__(self, network: Any, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.pad_id: int | None = network.config.pad_token_id
        self.mask_id: int | None = None if tokenizer is None else tokenizer.inner.mask_token_id

    def tokens_of(self, texts: Sequence[str], *, length: int | None = None) -> Tokens:
        """Texts as this model's tokens. Raises ``UserError`` where it was loaded without a tokenizer."""
        if self.tokenizer is None:
            raise UserError("The model was loaded without a tokenizer; put tokenizer.json into its folder.")
        return self.tokenizer.tokens_of(texts, length=length)

    def embed(self, tokens: Tokens) -> Float[Tensor, "b length width"]:
        """The word embeddings alone, without position and type."""
        return self.network.get_input_embeddings()(tokens.ids)

    def from_embeddings(self, embeddings: Float[Tensor, "b length width"], tokens: Tokens) -> Tensor:
        """Logits [b, classes] from word embeddings; of the tokens only the mask is used."""
        return self.network(inputs_embeds=embeddings, attention_mask=tokens.mask.long()).logits

    def forward(self, tokens: Tokens) -> Tensor:
        """Logits [b, classes]."""
        return self.from_embeddings(self.embed(tokens), tokens)


def load_text_model(
    source: str | Path | Any, *, num_classes: int | None = None, attention: Attention | None = None
) -> TextClassifier:
    """A :class:`TextClassifier` in evaluation mode, from a local folder or a transformers configuration.

    ``attention`` is how the network computes it (None: its own choice); explanations are the same.
    A folder's weights are read from safetensors, never unpickled, and nothing is fetched. Parts that it lacks, such as
    the classifier of a bare encoder, are drawn at random, which is logged. Raises ``UserError`` for a folder without
    a model, for a class count that is neither given nor in the weights, and for a network whose logits from word
    embeddings are not those from token ids.
    """
    with suppress(ImportError):
        import_torchvision()  # transformers imports it wherever it finds it, and fails where it does not match torch
    transformers = package("transformers", str(source), "text")
    if isinstance(source, str | Path):
        network, tokenizer = _from_folder(transformers, Path(source), num_classes, attention)
    else:
        network, tokenizer = _from_config(transformers, source, num_classes, attention), None
    model = TextClassifier(network, tokenizer).eval()
    _check_embeddings(model)
    return model


def save_text_model(model: TextClassifier, folder: Path) -> None:
    """Write what :func:`load_text_model` reads: safetensors, configuration and tokenizer."""
    model.network.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.inner.save_pretrained(folder)


def _from_config(transformers: Any, config: Any, num_classes: int | None, attention: Attention | None) -> Any:
    if num_classes is not None:
        config.num_labels = num_classes
    with sound_options(f"A text classifier of {type(config).__name__}"):
        return transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)


def _from_folder(
    transformers: Any, folder: Path, num_classes: int | None, attention: Attention | None
) -> tuple[Any, Tokenizer | None]:
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no text model; it needs config.json and weights as .safetensors.")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if num_classes is not None:
            config.num_labels = num_classes
        network, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged file and an unknown architecture raise many kinds
        raise UserError(f"The text model in {folder} cannot be read ({one_line(error)}); restore it.") from error
    drawn = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if drawn and num_classes is None:
        raise needs_classes(str(folder))
    if drawn:
        _logger.warning("Drawn at random, because %s does not hold them: %s", folder, ", ".join(drawn))
    return network, _tokenizer(transformers, folder, _positions(network))


def _positions(network: Any) -> int:
    """The most tokens that the network has positions for; some keep their first positions for padding."""
    kept = [0 if m.padding_idx is None else m.padding_idx + 1 for name, m in network.named_modules()
            if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)]  # fmt: skip
    return getattr(network.config, "max_position_embeddings", 10**9) - max(kept, default=0)


def _tokenizer(transformers: Any, folder: Path, positions: int) -> Tokenizer | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json")):
        return None
    try:
        inner = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"The tokenizer in {folder} cannot be read ({one_line(error)}); restore it.") from error
    if not inner.is_fast:
        raise UserError(f"The tokenizer in {folder} does not tell words apart; add its tokenizer.json.")
    return Tokenizer(inner, min(inner.model_max_length, positions))


@torch.no_grad()
def _check_embeddings(model: TextClassifier) -> None:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    words = [id for id in range(model.network.config.vocab_size) if id != model.pad_id]
    ids = torch.tensor([words[-1 - n % len(words)] for n in range(10)]).view(2, 5)
    ids = ids if model.pad_id is None else ids.masked_fill(~mask, model.pad_id)
    device = next(model.parameters()).device
    tokens = Tokens(ids.to(device), mask.to(device), torch.arange(5).expand(2, 5).to(device))
    expected = model.network(input_ids=tokens.ids, attention_mask=tokens.mask.long()).logits
    if not torch.allclose(model(tokens), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise UserError(
            f"{type(model.network).__name__} gives other logits from word embeddings than from token ids, so that it "
            "cannot be explained there; use an encoder such as BERT."
        )
