"""Any circuit, level by level."""

from circuitroute.engines.layered.definite import evaluated as evaluated
from circuitroute.engines.layered.definite import lean as lean
from circuitroute.engines.layered.naive import NaiveLayered as NaiveLayered
from circuitroute.engines.layered.numba.engine import NumbaLayered as NumbaLayered
from circuitroute.engines.layered.pyjuice import PyjuiceLayered as PyjuiceLayered
from circuitroute.engines.layered.torch.engine import TorchLayered as TorchLayered
