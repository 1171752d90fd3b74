"""Small networks for small images: a plain CNN and a ResNet of chosen widths and normalisation.

Both end in a 7 x 7 map on 28-pixel images (a strided CNN: 3 x 3), global average pooling and one linear layer, and
speak timm's words (``forward_features``, ``forward_head``, ``get_classifier``).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.models.layers import Norm, normalisation, start_like_he


class _PooledHead(nn.Module):
    fc: nn.Linear

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class SmallCNN(_PooledHead):
    """conv 3x3 - norm - ReLU, halved by average pooling between the layers.

    ``strided``: each layer halves its input itself, by a 4x4 kernel of stride 2, and nothing is pooled. With widths
    (64, 128, 256) that is the network for coloured digits of Park et al., Training debiased subnetworks with
    contrastive weight pruning, 2023 (https://arxiv.org/abs/2210.05247), but for its start, which is He's here.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        norm: Norm = "batch",
        conv_bias: bool = False,
        strided: bool = False,
    ) -> None:
        super().__init__()
        inputs = (channels, *widths[:-1])
        self._pools = not strided
        kernel, stride = (4, 2) if strided else (3, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, kernel, stride, padding=1, bias=conv_bias) for i, o in zip(inputs, widths)
        )
        self.norms = nn.ModuleList(normalisation(norm, width) for width in widths)
        self.relus = nn.ModuleList(nn.ReLU() for _ in widths)  # layers, so that what a level gives has a name
        self.fc = nn.Linear(widths[-1], num_classes)
        start_like_he(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """[b, channels, h, w] to [b, widths[-1], h / 2^m, w / 2^m] of n layers: m = n - 1, or n where strided."""
        for level, (conv, norm, relu) in enumerate(zip(self.convs, self.norms, self.relus)):
            x = relu(norm(conv(F.avg_pool2d(x, 2) if self._pools and level else x)))
        return x


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = normalisation(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = normalisation(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), normalisation(norm, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(_PooledHead):
    """A 3x3 stem of stride 2 and one residual block per width; only the second block halves the map again."""

    def __init__(
        self, num_classes: int, *, channels: int = 3, widths: Sequence[int] = (16, 32, 64), norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False)
        self.stem_norm = normalisation(norm, widths[0])
        inputs = (widths[0], *widths[:-1])
        strides = [2 if level == 1 else 1 for level in range(len(widths))]
        self.blocks = nn.Sequential(*(_Block(i, o, s, norm) for i, o, s in zip(inputs, widths, strides)))
        self.fc = nn.Linear(widths[-1], num_classes)
        start_like_he(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """[b, channels, h, w] to [b, widths[-1], h / 4, w / 4]."""
        return self.blocks(F.relu(self.stem_norm(self.stem(x))))
