"""Text classifiers of Hugging Face's transformers, with the word embeddings where explainers take their gradient.

Everything is local: a folder with ``config.json``, safetensors and a tokenizer, or a configuration whose weights are
drawn at random. Encoders such as BERT, MiniLM, DistilBERT, RoBERTa and ELECTRA work, with either attention.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hansfree.core import Tokens
from hansfree.errors import UserError
from hansfree.models.sources import needs_classes, one_line, package, sound_options
from hansfree.tokenization import Tokenizer, has_tokenizer, load_tokenizer
from hansfree.torchvision_guard import import_torchvision

Attention = Literal["sdpa", "eager"]

_logger = logging.getLogger(__name__)


@final
class TextClassifier(nn.Module):
    """A Hugging Face sequence classifier: tokens go in, logits come out, by way of its word embeddings.

    Position and type embeddings belong to the network behind :meth:`from_embeddings`. ``pad_id`` and ``mask_id`` are
    the tokens that an explainer's baseline may be made of, None where there is no such token. ``layers`` are those that
    were kept of a deeper network, None where all were.
    """

    def __init__(self, network: Any, tokenizer: Tokenizer | None = None, layers: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.layers = layers
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
    source: str | Path | Any,
    *,
    num_classes: int | None = None,
    attention: Attention | None = None,
    layers: Sequence[int] | None = None,
) -> TextClassifier:
    """A :class:`TextClassifier` in evaluation mode, from a local folder or a transformers configuration.

    ``attention`` is how the network computes it (None: its own choice); explanations are the same. ``layers`` keeps
    these of its encoder's layers, counted from 0, and drops the others.
    A folder's weights are read from safetensors, never unpickled, and nothing is fetched. Parts that it lacks, such as
    the classifier of a bare encoder, are drawn at random, which is logged. Raises ``UserError`` for a folder without
    a model, for a tokenizer with more tokens than the model knows, for layers that it lacks, for a class count that is
    neither given nor in the weights, and for a network whose logits from word embeddings are not those from token ids.
    """
    with suppress(ImportError):
        import_torchvision()  # transformers imports it wherever it finds it, and fails where it does not match torch
    transformers = package("transformers", str(source), "text")
    if isinstance(source, str | Path):
        network, tokenizer = _from_folder(transformers, Path(source), num_classes, attention)
    else:
        network, tokenizer = _from_config(transformers, source, num_classes, attention), None
    if layers is not None:
        keep_layers(network, layers)
    model = TextClassifier(network, tokenizer, None if layers is None else tuple(layers)).eval()
    _check_embeddings(model)
    return model


def save_text_model(model: TextClassifier, folder: Path, *, classes: Sequence[str] = ()) -> None:
    """Write what :func:`load_text_model` reads: safetensors, configuration and tokenizer."""
    if classes:
        model.network.config.id2label = dict(enumerate(classes))
        model.network.config.label2id = {name: number for number, name in enumerate(classes)}
    with _quiet(package("transformers", str(folder), "text")):
        model.network.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.inner.save_pretrained(folder)


def keep_layers(network: Any, layers: Sequence[int]) -> None:
    """Drop all but these ``layers`` of an encoder, counted from 0 and kept in their order, in place.

    Raises ``UserError`` for layers that it lacks, that are named twice or out of order, and for none.
    """
    name, stack = encoder_layers(network)
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < len(stack):
        raise UserError(
            f"model.layers must name some of the layers 0 to {len(stack) - 1}, each once and in order, not "
            f"{list(layers)}; the first, some of the middle and the last are usual."
        )
    network.set_submodule(name, nn.ModuleList(stack[n] for n in layers))
    network.config.num_hidden_layers = len(layers)


def encoder_layers(network: Any) -> tuple[str, nn.ModuleList]:
    """The path of an encoder's layers, and these. Raises ``UserError`` where it does not show them."""
    count = network.config.num_hidden_layers
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UserError(f"{type(network).__name__} shows no list of its {count} layers to choose from; leave out layers.")


def start_from(student: TextClassifier, teacher: TextClassifier) -> None:
    """Copy a teacher's weights into a student of some of its layers, those that ``student.layers`` counts.

    Raises ``UserError`` where they are not of one architecture but for the number of layers.
    """
    name, stack = encoder_layers(teacher.network)
    layers = range(len(encoder_layers(student.network)[1])) if student.layers is None else student.layers
    state = {key: value for key, value in teacher.state_dict().items() if not key.startswith(f"network.{name}.")}
    try:
        kept = nn.ModuleList(stack[n] for n in layers).state_dict(prefix=f"network.{name}.")
        student.load_state_dict({**state, **kept})
    except (RuntimeError, IndexError) as error:
        raise UserError(
            "method.start: teacher needs a teacher of the student's architecture with all layers that it counts; "
            "choose the same model for both, with layers: null for the teacher, or start: random."
        ) from error


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
        with _quiet(transformers):
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
    return network, _tokenizer(folder, network)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the package's own bars and reports: what matters of them is logged here."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _positions(network: Any) -> int:
    """The most tokens that the network has positions for; some keep their first positions for padding."""
    kept = [0 if m.padding_idx is None else m.padding_idx + 1 for name, m in network.named_modules()
            if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)]  # fmt: skip
    return getattr(network.config, "max_position_embeddings", 10**9) - max(kept, default=0)


def _tokenizer(folder: Path, network: Any) -> Tokenizer | None:
    if not has_tokenizer(folder):
        return None
    tokenizer = load_tokenizer(folder, limit=_positions(network))
    known, wanted = network.config.vocab_size, 1 + max(tokenizer.inner.get_vocab().values())
    if wanted > known:
        raise UserError(
            f"The tokenizer in {folder} has {wanted} tokens, but the model there knows {known}; put there the one that "
            "the model was trained with."
        )
    return tokenizer


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
