"""Training methods: one paper, one file. The module docstring of each is its method card."""

from hansfree.core import Method
from hansfree.methods.attention_distillation import AttentionDistillation
from hansfree.methods.erm import ERM
from hansfree.methods.explanation_distillation import ExplanationDistillation
from hansfree.methods.feature_distillation import FeatureDistillation
from hansfree.methods.output_distillation import OutputDistillation

METHODS: dict[str, type[Method]] = {
    "erm": ERM,
    "output-distillation": OutputDistillation,
    "feature-distillation": FeatureDistillation,
    "attention-distillation": AttentionDistillation,
    "explanation-distillation": ExplanationDistillation,
}

__all__ = [
    "ERM",
    "METHODS",
    "AttentionDistillation",
    "ExplanationDistillation",
    "FeatureDistillation",
    "OutputDistillation",
]
