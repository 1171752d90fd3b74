"""A second network trained beside the student: one optimiser, gradients clipped apart."""

from torch import nn

from hansfree.core import Method, Stage


def side_by_side(method: Method, *second: nn.Module) -> Stage | None:
    """The only stage of ``method``: the parameters of ``second`` are one group, all others of the method the other."""
    if method.stages_done > 0:
        return None
    apart = {id(p) for module in second for p in module.parameters()}
    trained = [p for p in method.parameters() if p.requires_grad]
    return Stage(
        groups={
            "student": tuple(p for p in trained if id(p) not in apart),
            "biased": tuple(p for p in trained if id(p) in apart),
        }
    )
