"""What is allowed: immutable, hashable constraints and the protocol to write new ones."""

from circuitroute.constraints.base import And as And
from circuitroute.constraints.base import Constraint as Constraint
from circuitroute.constraints.base import Not as Not
from circuitroute.constraints.base import Or as Or
from circuitroute.constraints.base import Over as Over
from circuitroute.constraints.base import State as State
from circuitroute.constraints.base import known_variables as known_variables
from circuitroute.constraints.base import shown as shown
from circuitroute.constraints.cnf import CNF as CNF
from circuitroute.constraints.cost import Cost as Cost
from circuitroute.constraints.counts import AtLeast as AtLeast
from circuitroute.constraints.counts import AtMost as AtMost
from circuitroute.constraints.counts import Between as Between
from circuitroute.constraints.counts import Count as Count
from circuitroute.constraints.counts import CountIn as CountIn
from circuitroute.constraints.counts import Exactly as Exactly
from circuitroute.constraints.groups import ActiveGroups as ActiveGroups
from circuitroute.constraints.groups import EachGroup as EachGroup
from circuitroute.constraints.groups import Groups as Groups
from circuitroute.constraints.groups import LayerBudget as LayerBudget
from circuitroute.constraints.logic import Logic as Logic
from circuitroute.constraints.logic import variables as variables
