"""Where the gradient of an image or of a text is taken: at its pixels, or at its word embeddings.

A text model for this purpose has two methods beside its forward: ``embed(tokens)``, the word embeddings
[b, length, width], and ``from_embeddings(embeddings, tokens)``, the logits from there on. An attribution of
every number of every embedding becomes one value per token by adding over the width, and zero at padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from hansfree.core import Tokens
from hansfree.errors import UserError


class Place(NamedTuple):
    """A network, its floating-point input, and how attributions of that input become a map."""

    network: nn.Module
    input: Tensor
    collect: Callable[[Tensor], Tensor]


def place_of(model: Any, input: Tensor | Tokens) -> Place:
    """Pixels as they are; texts at their word embeddings. Raises ``UserError`` for a model that shows none."""
    if isinstance(input, Tensor):
        return Place(model, input, lambda attribution: attribution)
    if not hasattr(model, "embed") or not hasattr(model, "from_embeddings"):
        raise UserError(
            f"{type(model).__name__} does not show its word embeddings, where texts are explained; load it with "
            "hansfree.models.text.load_text_model, or give it embed and from_embeddings."
        )

    def collect(attribution: Tensor) -> Tensor:
        return at_real_tokens(attribution.sum(-1), input)

    return Place(FromEmbeddings(model, input), model.embed(input), collect)


def at_real_tokens(values: Tensor, tokens: Tokens) -> Tensor:
    """``values`` [b, length] or [b, k, length], zero at padding."""
    mask = tokens.mask.to(values.device)
    return values * (mask if values.ndim == 2 else mask.unsqueeze(1))


class FromEmbeddings(nn.Module):
    """A text model as a network whose input is word embeddings [m b, length, width], m of them for each text."""

    def __init__(self, model: Any, tokens: Tokens) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, embeddings: Float[Tensor, "n length width"]) -> Tensor:
        """Logits [m b, classes]."""
        tokens, times = self.tokens, len(embeddings) // len(self.tokens)
        if times > 1:
            tokens = Tokens(*(values.repeat(times, 1) for values in (tokens.ids, tokens.mask, tokens.word_ids)))
        return self.model.from_embeddings(embeddings, tokens)
