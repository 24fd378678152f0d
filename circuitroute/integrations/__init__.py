"""Adapters: circuitroute's routers in the mixture-of-experts layers of other stacks.

Each is a package of its own that imports its stack when it is used, never before.
"""

from circuitroute.integrations import serving as serving
from circuitroute.integrations import transformers as transformers
