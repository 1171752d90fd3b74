"""What a model is asked for and what a source gives: one request, one answer, whichever package builds it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from hansfree.core import Encoding
from hansfree.errors import UserError
from hansfree.torchvision_guard import import_torchvision

Stem = Literal["imagenet", "small"]


@dataclass(frozen=True)
class Wanted:
    """A network as it is asked for; ``name`` comes without its source, and ``classes`` None means the weights' own."""

    name: str
    classes: int | None
    channels: int = 3
    pretrained: bool | str = False
    stem: Stem = "imagenet"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Built:
    """A network and the preprocessing that it expects; ``options`` is what builds it again, without any download."""

    network: nn.Module
    classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    encoding: Encoding = "plain"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    label_names: tuple[str, ...] = ()


def package(module: str, model: str, extra: str) -> Any:
    """Import ``module`` beside any torch. Raises ``UserError`` naming the extra where it is not installed."""
    try:
        return import_torchvision(module)
    except ImportError as error:
        raise UserError(f"The model {model!r} needs an extra: pip install 'hansfree[{extra}]' ({error}).") from error


@contextmanager
def fetching(model: str) -> Iterator[None]:
    """Turn whatever a failed download raises into a ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each package and its network client raise kinds of their own
        raise UserError(
            f"The published weights of {model} could not be fetched ({one_line(error)}); "
            "connect to the network, or give `weights: FILE` in place of `pretrained`."
        ) from error


@contextmanager
def sound_options(model: str) -> Iterator[None]:
    """Turn what a constructor says about wrong options into a ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{model} cannot be built so ({one_line(error)}); check its name and options.") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, its kind where it has none."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def needs_classes(model: str) -> UserError:
    """The error for a model whose number of classes nobody gave."""
    return UserError(f"The model {model!r} needs num_classes, or `pretrained` for published weights and their classes.")


def three_channels(wanted: Wanted, model: str) -> None:
    """Raise ``UserError`` unless images of three channels are wanted."""
    if wanted.channels != 3:
        raise UserError(f"{model} takes images of 3 channels, not {wanted.channels}; choose another network for these.")
