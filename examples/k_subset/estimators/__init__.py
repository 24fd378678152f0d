"""Gradient estimators of an expected loss over k-subsets, all behind one call."""

from .exact import Enumeration
from .interface import Estimator, Loss, relative_to_the_others, score_term
from .ours import MeanField, Mode, Score, Simple, SimpleScore, TaylorScore, TemperedSimple
from .peers import IMLE, GumbelScore, RelaxedGumbel, StraightThroughGumbel
from .registry import METHODS, Method, build

__all__ = [
    "IMLE",
    "METHODS",
    "Enumeration",
    "Estimator",
    "GumbelScore",
    "Loss",
    "MeanField",
    "Method",
    "Mode",
    "RelaxedGumbel",
    "Score",
    "Simple",
    "SimpleScore",
    "StraightThroughGumbel",
    "TaylorScore",
    "TemperedSimple",
    "build",
    "relative_to_the_others",
    "score_term",
]
