"""Circuit -> tensor programs: one folder per op, a naive engine beside its fast versions.

Two ops cover everything: ``subset``, the flat count family, and ``layered``, any circuit. Which engine runs depends on
the device and on what is installed; ``Circuit.engine_for`` names it and ``Circuit.with_engine`` forces one.
"""

from circuitroute.engines.ahead import warmup as warmup
from circuitroute.engines.base import Engine as Engine
from circuitroute.engines.base import Inference as Inference
from circuitroute.engines.base import LayeredEngine as LayeredEngine
from circuitroute.engines.base import certainly_finite as certainly_finite
from circuitroute.engines.choice import ENGINES as ENGINES
from circuitroute.engines.choice import choose as choose
from circuitroute.engines.choice import cost as cost
from circuitroute.engines.choice import engine_name as engine_name
from circuitroute.engines.choice import engine_of as engine_of
from circuitroute.engines.choice import layered_engine as layered_engine
from circuitroute.engines.choice import op_of as op_of
from circuitroute.engines.choice import require as require
