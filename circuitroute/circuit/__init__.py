"""The compiled form of a constraint: arrays of nodes and elements, their properties and counts."""

from circuitroute.circuit.circuit import Circuit as Circuit
from circuitroute.circuit.graph import Graph as Graph
from circuitroute.circuit.graph import NodeKind as NodeKind
