"""Exact inference over constrained subsets.

Declare a constraint, compile it to a circuit, call the circuit on logits: a distribution over the allowed
subsets with exact marginals, samples and gradients. Mixture-of-experts routers are thin modules on top.
"""

import sys as _sys

from circuitroute import compilation as compilation
from circuitroute import engines as engines
from circuitroute import integrations as integrations
from circuitroute.circuit.vtree import Vtree as Vtree
from circuitroute.compilation import compile as compile
from circuitroute.compilation import register_compiler as register_compiler
from circuitroute.constraints import CNF as CNF
from circuitroute.constraints import ActiveGroups as ActiveGroups
from circuitroute.constraints import AtLeast as AtLeast
from circuitroute.constraints import AtMost as AtMost
from circuitroute.constraints import Between as Between
from circuitroute.constraints import Constraint as Constraint
from circuitroute.constraints import Cost as Cost
from circuitroute.constraints import CountIn as CountIn
from circuitroute.constraints import EachGroup as EachGroup
from circuitroute.constraints import Exactly as Exactly
from circuitroute.constraints import Groups as Groups
from circuitroute.constraints import LayerBudget as LayerBudget
from circuitroute.constraints import Logic as Logic
from circuitroute.constraints import variables as variables
from circuitroute.errors import CircuitFileError as CircuitFileError
from circuitroute.errors import CircuitPropertyError as CircuitPropertyError
from circuitroute.errors import CircuitRouteError as CircuitRouteError
from circuitroute.errors import CircuitTooLargeError as CircuitTooLargeError
from circuitroute.errors import EngineError as EngineError
from circuitroute.errors import InfeasibleError as InfeasibleError
from circuitroute.errors import UnsupportedConstraintError as UnsupportedConstraintError
from circuitroute.inference import divergence as divergence
from circuitroute.inference.circuit import Circuit as Circuit
from circuitroute.inference.distribution import SubsetDistribution as SubsetDistribution
from circuitroute.inference.reading import load as load
from circuitroute.inference.reading import read_cnf as read_cnf
from circuitroute.inference.reading import read_nnf as read_nnf
from circuitroute.inference.reading import read_sdd as read_sdd
from circuitroute.keys import random_key as random_key
from circuitroute.layers import nn as nn
from circuitroute.layers.allocation import LayerAllocation as LayerAllocation
from circuitroute.layers.budget import Budget as Budget
from circuitroute.layers.budget import BudgetState as BudgetState
from circuitroute.layers.budget import log_count_polynomial as log_count_polynomial
from circuitroute.layers.budget_router import BudgetRouter as BudgetRouter
from circuitroute.layers.experts import StackedExperts as StackedExperts
from circuitroute.layers.moe import MoE as MoE
from circuitroute.layers.routers import DynamicKRouter as DynamicKRouter
from circuitroute.layers.routers import ExactKRouter as ExactKRouter
from circuitroute.layers.routers import Router as Router
from circuitroute.layers.routers import TopKRouter as TopKRouter
from circuitroute.layers.soft_router import SoftTopKRouter as SoftTopKRouter
from circuitroute.priors.distribution import PriorDistribution as PriorDistribution
from circuitroute.priors.prior import SubsetPrior as SubsetPrior
from circuitroute.routing import balance as balance
from circuitroute.routing import estimators as estimators
from circuitroute.routing import losses as losses
from circuitroute.routing import metrics as metrics
from circuitroute.routing import replay as replay
from circuitroute.routing import schedules as schedules
from circuitroute.routing.batch import BatchRouting as BatchRouting
from circuitroute.routing.batch import route_batch as route_batch
from circuitroute.routing.controllers import CountController as CountController
from circuitroute.routing.decision import Routing as Routing
from circuitroute.routing.decision import SoftRouting as SoftRouting
from circuitroute.routing.estimators import Estimator as Estimator
from circuitroute.routing.records import RoutingRecord as RoutingRecord
from circuitroute.routing.route import route as route
from circuitroute.routing.sequence import SequenceRouting as SequenceRouting
from circuitroute.routing.sequence import SequenceState as SequenceState
from circuitroute.routing.sequence import route_sequence as route_sequence
from circuitroute.routing.soft_topk import soft_topk as soft_topk
from circuitroute.statistics.poisson_binomial import PoissonBinomial as PoissonBinomial
from circuitroute.statistics.prescribed import logits_for_marginals as logits_for_marginals

# Public modules answer to their public names, wherever they live: `from circuitroute.replay import mismatch`.
for _module in (balance, divergence, estimators, losses, metrics, nn, replay, schedules):
    _sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module

__version__ = "0.1.0"
