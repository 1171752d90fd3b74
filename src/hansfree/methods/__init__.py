"""Training methods: one paper, one file. The module docstring of each is its method card."""

from hansfree.core import Method
from hansfree.methods.at import AT
from hansfree.methods.attention_distillation import AttentionDistillation
from hansfree.methods.cat_kd import CATKD
from hansfree.methods.crd import CRD
from hansfree.methods.dcwp import DCWP
from hansfree.methods.dfa import DFA
from hansfree.methods.dfr import DFR
from hansfree.methods.dl_dl import DLDL
from hansfree.methods.e2kd import E2KD
from hansfree.methods.end import EnD
from hansfree.methods.erm import ERM
from hansfree.methods.explanation_distillation import ExplanationDistillation
from hansfree.methods.feature_distillation import FeatureDistillation
from hansfree.methods.ft import FT
from hansfree.methods.gain import GAIN
from hansfree.methods.gals import GALS
from hansfree.methods.gce import GCE
from hansfree.methods.grad_cam_distillation import GradCAMDistillation
from hansfree.methods.group_dro import GroupDRO
from hansfree.methods.irm import IRM
from hansfree.methods.isnet import ISNet
from hansfree.methods.jtt import JTT
from hansfree.methods.kd import KD
from hansfree.methods.label_smoothing import LabelSmoothing
from hansfree.methods.lff import LfF
from hansfree.methods.linear_probe import LinearProbe
from hansfree.methods.mixup import Mixup
from hansfree.methods.model_guidance import ModelGuidance
from hansfree.methods.neuron_differentiation import NeuronDifferentiation
from hansfree.methods.output_distillation import OutputDistillation
from hansfree.methods.pgi import PGI
from hansfree.methods.rebias import ReBias
from hansfree.methods.resampling import ClassResampling, ClassReweighting, Resampling, Reweighting
from hansfree.methods.review_kd import ReviewKD
from hansfree.methods.rrr import RRR
from hansfree.methods.sskd import SSKD

METHODS: dict[str, type[Method]] = {
    "erm": ERM,
    "label-smoothing": LabelSmoothing,
    "mixup": Mixup,
    "linear-probe": LinearProbe,
    "output-distillation": OutputDistillation,
    "feature-distillation": FeatureDistillation,
    "attention-distillation": AttentionDistillation,
    "grad-cam-distillation": GradCAMDistillation,
    "explanation-distillation": ExplanationDistillation,
    "dl-dl": DLDL,
    "kd": KD,
    "e2kd": E2KD,
    "at": AT,
    "cat-kd": CATKD,
    "review-kd": ReviewKD,
    "crd": CRD,
    "ft": FT,
    "sskd": SSKD,
    "gce": GCE,
    "lff": LfF,
    "dfa": DFA,
    "end": EnD,
    "rebias": ReBias,
    "dcwp": DCWP,
    "rrr": RRR,
    "isnet": ISNet,
    "gain": GAIN,
    "gals": GALS,
    "model-guidance": ModelGuidance,
    "resampling": Resampling,
    "reweighting": Reweighting,
    "class-resampling": ClassResampling,
    "class-reweighting": ClassReweighting,
    "group-dro": GroupDRO,
    "irm": IRM,
    "pgi": PGI,
    "jtt": JTT,
    "dfr": DFR,
    "neuron-differentiation": NeuronDifferentiation,
}

__all__ = [
    "AT",
    "CATKD",
    "CRD",
    "DCWP",
    "DFA",
    "DFR",
    "DLDL",
    "E2KD",
    "ERM",
    "FT",
    "GAIN",
    "GALS",
    "GCE",
    "IRM",
    "JTT",
    "KD",
    "METHODS",
    "PGI",
    "RRR",
    "SSKD",
    "AttentionDistillation",
    "ClassResampling",
    "ClassReweighting",
    "EnD",
    "ExplanationDistillation",
    "FeatureDistillation",
    "GradCAMDistillation",
    "GroupDRO",
    "ISNet",
    "LabelSmoothing",
    "LfF",
    "LinearProbe",
    "Mixup",
    "ModelGuidance",
    "NeuronDifferentiation",
    "OutputDistillation",
    "ReBias",
    "Resampling",
    "ReviewKD",
    "Reweighting",
]
