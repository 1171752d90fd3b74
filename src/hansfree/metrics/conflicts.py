"""What is known of the shortcut in the training data, and how well a method found the samples that it misleads."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def predictive_power(attribute: Int[Tensor, "n"], label: Int[Tensor, "n"]) -> float | None:
    """How much of the label an attribute tells, in [0, 1]; None where all samples have one label.

    Frequencies stand for probabilities, so few samples make it too high: of an attribute that tells nothing it is about
    (values - 1) (classes - 1) / (2 n H(Y)).

    Formula. I(A; Y) / H(Y)
    Source. Niu et al., Rectifying shortcut learning via cellular differentiation in deep learning neurons, equation 1
    """
    entropy = _entropy(label)
    if entropy == 0:
        return None
    return (entropy + _entropy(attribute) - _entropy(torch.stack([attribute, label], 1))) / entropy


def mined_precision(found: Bool[Tensor, "n"], conflicting: Bool[Tensor, "n"]) -> float | None:
    """The share of the samples found that do conflict with the shortcut; None where none was found.

    Formula. |found and conflicting| / |found|
    Source. The usual definition.
    """
    return _share(conflicting[found])


def mined_recall(found: Bool[Tensor, "n"], conflicting: Bool[Tensor, "n"]) -> float | None:
    """The share of the samples that conflict with the shortcut which were found; None where none conflicts.

    Formula. |found and conflicting| / |conflicting|
    Source. The usual definition.
    """
    return _share(found[conflicting])


def _share(truths: Bool[Tensor, "n"]) -> float | None:
    return truths.double().mean().item() if len(truths) else None


def _entropy(values: Int[Tensor, "n *several"]) -> float:
    """In nats, of the rows' frequencies."""
    counts = values.unique(dim=0, return_counts=True)[1].double()
    return torch.special.entr(counts / counts.sum()).sum().clamp(min=0).item()
