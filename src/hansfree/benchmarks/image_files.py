"""One image file, read whatever its kind, or refused in one sentence."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hansfree.errors import UserError

Mode = Literal["L", "RGB", "RGBA"]


def read_image(path: Path, mode: Mode = "RGB") -> Image.Image:
    """The image in ``path``, turned as its camera says, in ``mode``: 16 bits become 8, CMYK and grey become colours.

    Raises ``UserError`` for a file that is missing, damaged, cut short, no image, an animation, one of floating-point
    values, or so large that it might be meant to fill the memory.
    """
    with _opened(path) as file:
        return eight_bits(ImageOps.exif_transpose(file)).convert(mode)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of the image that :func:`read_image` gives, without decoding it. Raises as that does."""
    with _opened(path) as file:
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (file.height, file.width) if turned else (file.width, file.height)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if (frames := getattr(file, "n_frames", 1)) > 1:
                    raise UserError(f"{path} is an animation of {frames} pictures; save one of them alone.")
                if file.mode == "F":
                    raise UserError(f"{path} holds floating-point values, of which none is white; save it with 8 bits.")
                yield file
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; check the path.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{path} has more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels; save it smaller.") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image of a known format; replace it.") from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or cut short ({reason}); replace it.") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits with 8; all others as they are."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image, dtype=np.float64) / 65535  # Pillow would cut off what is above 255
    return Image.fromarray((255 * values.clip(0, 1)).round().astype(np.uint8))
