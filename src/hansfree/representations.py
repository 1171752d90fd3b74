"""What networks make of the same test samples: where their features lie in the plane, and how alike layers are.

Layers are convolutions and linear layers; features are what goes into the last of them, averaged over positions.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hansfree.core import Split
from hansfree.errors import UserError
from hansfree.measuring import sample
from hansfree.metrics.cka import MinibatchCKA, gram

Picture = Literal["tsne", "umap", "cka"]
SAMPLES = 1000
BATCH = 100
"""Samples whose kernels CKA holds at a time."""
NEEDED = {"tsne": ("sklearn", "scikit-learn"), "umap": ("umap", "umap-learn")}


class Seen(NamedTuple):
    """What a network makes of a batch."""

    kernels: dict[str, Tensor]
    """Of each layer by name, in the order in which they finish: see :func:`hansfree.metrics.cka.gram`."""
    features: Float[Tensor, "b d"]


def check_pictures(kinds: Iterable[Picture]) -> None:
    """Raises ``UserError`` for a picture that a missing package draws."""
    for kind in kinds:
        module, package = NEEDED.get(kind, ("torch", "torch"))
        if find_spec(module) is None:
            raise UserError(f"evaluation.pictures: {kind} needs a package that is missing: pip install {package}.")


def representations(
    networks: Mapping[str, nn.Module], split: Split, kinds: Iterable[Picture], device: torch.device | str
) -> dict[str, Any]:
    """Arrays for pictures of at most 1,000 samples of ``split``, the same for all ``networks``.

    ``label`` and ``bias`` [n] (where known) and ``networks``, their names; ``tsne_NAME`` and ``umap_NAME``, [n, 2];
    ``cka_NAME_OTHER``, [layers, layers], of each pair (of one network alone: with itself), and ``layers_NAME``.
    """
    index = sample(len(split), SAMPLES)
    arrays: dict[str, Any] = {"networks": np.array(list(networks)), "label": split.label[index].numpy()}
    if split.bias is not None:
        arrays["bias"] = split.bias[index].numpy()
    pairs = list(combinations(networks, 2)) or [(name, name) for name in networks]
    alike = {pair: MinibatchCKA() for pair in pairs}
    features: dict[str, list[Tensor]] = {name: [] for name in networks}
    for rows in index.split(BATCH):
        images = split.batch(rows).to(device).images
        shown = {name: seen(network, images) for name, network in networks.items()}
        for name, found in shown.items():
            features[name].append(found.features)
            arrays[f"layers_{name}"] = np.array(list(found.kernels))
        for (first, second), cka in alike.items():
            cka.add(list(shown[first].kernels.values()), list(shown[second].kernels.values()))
    for kind in dict.fromkeys(kinds):
        if kind == "cka":
            arrays |= {f"cka_{first}_{second}": cka.value.numpy() for (first, second), cka in alike.items()}
        else:
            arrays |= {f"{kind}_{name}": placed(torch.cat(parts).numpy(), kind) for name, parts in features.items()}
    return arrays


@torch.no_grad()
def seen(network: nn.Module, images: Float[Tensor, "b c h w"]) -> Seen:
    """The kernels of the layers, and the features, of ``images``; in eval mode. Raises ``UserError`` without layers."""
    kernels: dict[str, Tensor] = {}
    given: list[Tensor] = []

    def note(name: str, input: Tensor, output: Tensor) -> None:
        kernels[name] = gram(output.cpu())
        given[:] = [input]

    was_training = network.training
    network.eval()
    with _watching(network, note):
        network(images)
    network.train(was_training)
    if not given:
        raise UserError(
            f"{type(network).__name__} has no convolution and no linear layer, of which evaluation.pictures could show "
            "anything; leave evaluation.pictures out."
        )
    last = given[0]
    return Seen(kernels, (last.flatten(2).mean(2) if last.ndim == 4 else last.flatten(1)).float().cpu())


@contextmanager
def _watching(network: nn.Module, note: Any) -> Iterator[None]:
    """While open, ``note`` is told the name, the input and the output of every layer that is called."""

    def hook(name: str) -> Any:
        return lambda layer, inputs, output: note(name, inputs[0], output)

    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def placed(features: np.ndarray, kind: Literal["tsne", "umap"]) -> np.ndarray:
    """Features [n, d] in the plane, [n, 2], with a fixed seed.

    tsne: van der Maaten & Hinton, 2008, https://jmlr.org/papers/v9/vandermaaten08a.html, perplexity 30 (a third of the
    samples, where they are fewer than 90). umap: McInnes et al., 2018, https://arxiv.org/abs/1802.03426.
    """
    if kind == "umap":
        from umap import UMAP  # pyright: ignore[reportMissingImports]

        return np.asarray(UMAP(random_state=0).fit_transform(features), dtype=np.float32)
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features).astype(np.float32)
