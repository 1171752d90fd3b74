"""Where a model looked: one explainer per idea, all with the same call.

``logits, map = explainer(model, input, target)`` is one forward pass; with grad mode on, the map can be a loss.
"""

from hansfree.core import Explainer
from hansfree.explainers.bcos import BCos
from hansfree.explainers.features import Attention, FeatureMap
from hansfree.explainers.grad_cam import GradCAM
from hansfree.explainers.gradient import GradientXInput, InputGradient
from hansfree.explainers.integrated_gradients import IntegratedGradients
from hansfree.explainers.loss_gradient import LossGradient
from hansfree.explainers.lrp import LRP
from hansfree.explainers.smooth import SmoothGrad

EXPLAINERS: dict[str, type[Explainer]] = {
    "gradient": InputGradient,
    "gradient-x-input": GradientXInput,
    "lrp": LRP,
    "integrated-gradients": IntegratedGradients,
    "loss-gradient": LossGradient,
    "smoothgrad": SmoothGrad,
    "grad-cam": GradCAM,
    "bcos": BCos,
    "attention": Attention,
    "features": FeatureMap,
}

__all__ = [
    "EXPLAINERS",
    "LRP",
    "Attention",
    "BCos",
    "FeatureMap",
    "GradCAM",
    "GradientXInput",
    "InputGradient",
    "IntegratedGradients",
    "LossGradient",
    "SmoothGrad",
]
