"""Methods that the library does not have, to compare with: as their papers define them, and controls."""

from .balanced import BalancedStudent, LossFreeStudent, MicroBatchStudent
from .controls import RandomRouter, UniformProbeStudent
from .default_moe import DefaultStudent
from .grin import GrinRouter
from .gumbel import GumbelTopKRouter
from .remoe import ReMoERouter, ReMoEStudent

__all__ = [
    "BalancedStudent",
    "DefaultStudent",
    "GrinRouter",
    "GumbelTopKRouter",
    "LossFreeStudent",
    "MicroBatchStudent",
    "RandomRouter",
    "ReMoERouter",
    "ReMoEStudent",
    "UniformProbeStudent",
]
