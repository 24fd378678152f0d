"""The flat count family: one count potential over all variables. A naive engine and its fast versions."""

from circuitroute.engines.subset.naive import NaiveSubset as NaiveSubset
from circuitroute.engines.subset.numba.engine import NumbaSubset as NumbaSubset
from circuitroute.engines.subset.torch.engine import TorchSubset as TorchSubset
from circuitroute.engines.subset.triton.engine import TritonSubset as TritonSubset
