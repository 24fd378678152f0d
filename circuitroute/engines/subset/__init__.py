"""The flat count family: one count potential over all variables. A naive engine and its fast versions."""

from circuitroute.engines.subset.eager import TorchSubset as TorchSubset
from circuitroute.engines.subset.fused import TritonSubset as TritonSubset
from circuitroute.engines.subset.naive import NaiveSubset as NaiveSubset
from circuitroute.engines.subset.numba import NumbaSubset as NumbaSubset
