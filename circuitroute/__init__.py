"""Exact inference over constrained subsets.

Declare a constraint, compile it to a circuit, call the circuit on logits: a distribution over the allowed
subsets with exact marginals, samples and gradients. Mixture-of-experts routers are thin modules on top.
"""

from circuitroute import divergence as divergence
from circuitroute import integrations as integrations
from circuitroute import losses as losses
from circuitroute import metrics as metrics
from circuitroute import replay as replay
from circuitroute.budget import Budget as Budget
from circuitroute.budget import BudgetRouter as BudgetRouter
from circuitroute.budget import BudgetState as BudgetState
from circuitroute.circuit import Circuit as Circuit
from circuitroute.compilation import compile as compile
from circuitroute.compilation import register_compiler as register_compiler
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
from circuitroute.distribution import SubsetDistribution as SubsetDistribution
from circuitroute.errors import CircuitFileError as CircuitFileError
from circuitroute.errors import CircuitPropertyError as CircuitPropertyError
from circuitroute.errors import CircuitRouteError as CircuitRouteError
from circuitroute.errors import CircuitTooLargeError as CircuitTooLargeError
from circuitroute.errors import EngineError as EngineError
from circuitroute.errors import InfeasibleError as InfeasibleError
from circuitroute.errors import UnsupportedConstraintError as UnsupportedConstraintError
from circuitroute.estimators import Estimator as Estimator
from circuitroute.interop.nnf import read_nnf as read_nnf
from circuitroute.interop.sdd import read_sdd as read_sdd
from circuitroute.interop.storage import load as load
from circuitroute.keys import random_key as random_key
from circuitroute.moe import MoE as MoE
from circuitroute.replay import RoutingRecord as RoutingRecord
from circuitroute.routers import DynamicKRouter as DynamicKRouter
from circuitroute.routers import ExactKRouter as ExactKRouter
from circuitroute.routers import Router as Router
from circuitroute.routers import SoftTopKRouter as SoftTopKRouter
from circuitroute.routers import TopKRouter as TopKRouter
from circuitroute.routing import Routing as Routing
from circuitroute.routing import SoftRouting as SoftRouting
from circuitroute.routing import route as route
from circuitroute.soft import LayerAllocation as LayerAllocation
from circuitroute.soft import soft_topk as soft_topk

__version__ = "0.1.0"
