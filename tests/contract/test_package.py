"""The package itself: its public names, its version, and what importing it costs."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import hansfree
from hansfree import core, errors, explainers, training


def test_every_public_name_is_there():
    for name in hansfree.__all__:
        assert getattr(hansfree, name) is not None
    assert set(dir(hansfree)) >= set(hansfree.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hansfree.nothing


def test_names_are_those_of_their_modules():
    assert hansfree.Batch is core.Batch
    assert hansfree.fit is training.fit
    assert hansfree.UserError is errors.UserError
    assert hansfree.explainers is explainers


def test_the_version_is_the_installed_one():
    assert hansfree.__version__ == importlib.metadata.version("hansfree")


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_bare_import_and_the_help_wait_for_nothing_heavy():
    assert not {"torch", "numpy", "accelerate", "torchvision"} & loaded_by("import hansfree, hansfree.cli")


def test_optional_packages_are_imported_only_when_used():
    names = "; ".join(f"hansfree.{name}" for name in hansfree.__all__)
    optional = {"torchvision", "timm", "matplotlib", "mlxtend", "ray", "transformers", "lightning"}
    assert not optional & loaded_by(f"import hansfree; {names}")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "hansfree", "--help"], capture_output=True, text=True, check=True)
    assert "suite" in done.stdout


def test_the_type_checker_sees_the_same_names():
    tree = ast.parse(Path(hansfree.__file__).read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name for node in imported if (node.module or "").startswith("hansfree") for alias in node.names}
    assert seen == set(hansfree.__all__)
