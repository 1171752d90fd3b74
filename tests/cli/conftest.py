from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def small(**changes):
    """A run of a second or two on a few embedded digits."""
    return {
        "name": "small",
        "benchmark": {"name": "coloured-digits", "limit": 300, "valid": 60, "test": 60},
        "model": {"name": "small-cnn", "widths": [4, 8], "norm": "scale"},
        "method": {"name": "erm"},
        "training": {"epochs": 2, "batch_size": 32, "optimiser": "adam"},
        **changes,
    }


@pytest.fixture
def config(tmp_path):
    """Writes a small config and gives its path."""

    def write(name="small.yaml", **changes):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(small(**changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def finished(hansfree, config, tmp_path):
    """The folder of a finished small run."""
    code, _, err = hansfree("run", config(), "--out", tmp_path / "finished")
    assert code == 0, err
    return tmp_path / "finished"
