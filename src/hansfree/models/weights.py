"""Reading weights from files without ever unpickling code."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hansfree.core import Classifier
from hansfree.errors import UserError


def load_weights(model: Classifier, path: Path) -> None:
    """Put the weights in ``path`` into ``model``. Raises ``UserError`` where they belong to another network."""
    state = read_weights(path)
    for prefix in ("module.", "network.module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not any(name.startswith("network.") for name in state):  # a checkpoint of the bare network
        state = {f"network.{name}": value for name, value in state.items()}
    own = model.state_dict()
    differing = [name for name, value in own.items() if name in state and state[name].shape != value.shape]
    if differing:
        name = differing[0]
        raise UserError(
            f"{path} does not fit {model.config['architecture']}: {name.removeprefix('network.')} has shape "
            f"{tuple(state[name].shape)} there and {tuple(own[name].shape)} here; "
            "give the architecture, options and class count that the weights were trained with."
        )
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        what = f"{missing[0].removeprefix('network.')} is missing" if missing else f"{extra[0]} is not known here"
        raise UserError(
            f"{path} holds weights of another architecture than {model.config['architecture']}: {what}; "
            "name the architecture that the weights belong to."
        )
    # Names and shapes agree, so these are weights of the versions of the modules that stand here.
    own.update((name, state[name]) for name in own)
    model.load_state_dict(own)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or torch file. Raises ``UserError`` for a file of anything else."""
    if not path.is_file():
        raise UserError(f"There are no weights at {path}; check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        if "Weights only load failed" in str(error):
            what = "is no file of plain tensors and is not loaded; save a state_dict instead"
        else:
            what = "is damaged or not a file of weights; restore it or export the model again"
        raise UserError(f"{path} {what}.") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no tensors by name; save a model's state_dict.")
    return state
