"""Networks by name, each carrying its own preprocessing: pixels in [0, 1] go in, logits come out."""

from hansfree.models.layers import ScaleNorm
from hansfree.models.loading import (
    MODELS,
    SOURCES,
    attach_adapter,
    load_model,
    save_model,
    transplant_head,
    transplant_last_layer,
    with_batch_statistics,
    wrap,
)
from hansfree.models.small import SmallCNN, SmallResNet

__all__ = [
    "MODELS",
    "SOURCES",
    "ScaleNorm",
    "SmallCNN",
    "SmallResNet",
    "attach_adapter",
    "load_model",
    "save_model",
    "transplant_head",
    "transplant_last_layer",
    "with_batch_statistics",
    "wrap",
]
