"""The ops: a routing step of training, forward and back, and one of evaluation, forward alone.

Shapes: T tokens, N experts, K largest count.

The cases are those of the op ``subset``. What differs is the yardstick, which renormalises its weights as deployed
routers do, and what is read of the decision: gates or padded slots alone, or the marginals and the log-probability too,
as a step with a balance loss and a policy gradient does.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.registry import BOTH, FORWARD, Outputs, op
from benchmarks.subset.workload import CHECKED_TOKENS, Subset, SubsetCase


@op
class TrainingStep(Subset):
    """A decision and what is read of it, forward and back, against softmax + topk + gather + renormalise."""

    name = "step"
    baseline = "deployed"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The options are those of the op ``subset``."""

    def errors(self, case: SubsetCase, outputs: Outputs, gradient: Tensor) -> dict[str, float | None]:
        """Of the results and of their gradient, against the naive engine in float64, whose decision is the same."""
        if "truth" not in outputs.values:
            return {FORWARD: None, BOTH: None}
        leaf = case.logits[:CHECKED_TOKENS].cpu().double().requires_grad_()
        truth: Outputs = outputs.values["truth"](leaf)
        forward = largest_error(outputs.results, truth.results)
        if not gradient.any():  # nothing was differentiated
            return {FORWARD: forward, BOTH: None}
        upstream = [case.upstream(x)[:CHECKED_TOKENS].cpu().double() for x in outputs.results]
        (expected,) = torch.autograd.grad(truth.results, leaf, upstream)
        return {FORWARD: forward, BOTH: largest_error((gradient,), (expected,))}


@op
class Evaluation(TrainingStep):
    """A decision of evaluation, without gradients: the mode and its weights, against the same yardstick."""

    name = "evaluation"
    baseline = "deployed"


def largest_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest absolute difference over the tokens that are checked."""
    pairs = zip(found, truth, strict=True)
    return max(float((x[:CHECKED_TOKENS].detach().cpu().double() - y.detach()).abs().max()) for x, y in pairs)
