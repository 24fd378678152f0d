"""The compiled form of a constraint: arrays of nodes and elements, their properties and counts."""

from circuitroute.circuit.compiled import Compiled as Compiled
from circuitroute.circuit.compiled import Parts as Parts
from circuitroute.circuit.graph import DeferredGraph as DeferredGraph
from circuitroute.circuit.graph import Graph as Graph
from circuitroute.circuit.graph import NodeKind as NodeKind
