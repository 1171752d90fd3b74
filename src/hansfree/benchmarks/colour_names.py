"""Eleven basic colour terms, the nearest one in CIELAB to each pixel: colours as concepts.

The terms are Berlin and Kay's, as in Broden; each has one typical colour here (CSS's, with its darker green and grey),
where Broden's colours follow people's namings (van de Weijer et al., 2009, https://doi.org/10.1109/TIP.2009.2019809).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_TYPICAL = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (139, 69, 19), "green": (0, 128, 0), "grey": (128, 128, 128),
    "orange": (255, 165, 0), "pink": (255, 192, 203), "purple": (128, 0, 128), "red": (255, 0, 0),
    "white": (255, 255, 255), "yellow": (255, 255, 0),
}  # fmt: skip
COLOURS = tuple(_TYPICAL)

_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)


def lab(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """CIELAB (D65, 2 degrees) of sRGB in [0, 1]: lightness in [0, 100], and two axes of colour."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    xyz = torch.einsum("oc,bchw->bohw", images.new_tensor(_TO_XYZ), linear) / images.new_tensor(_WHITE)[:, None, None]
    f = torch.where(xyz > (6 / 29) ** 3, xyz ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def colour_of(images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b h w"]:
    """The number in ``COLOURS`` of the term nearest to each pixel."""
    typical = lab(images.new_tensor(list(_TYPICAL.values())).view(-1, 3, 1, 1) / 255)[..., 0, 0]
    places = lab(images).movedim(1, -1)
    return torch.cdist(places.flatten(0, 2), typical).argmin(1).view(places.shape[:-1])
