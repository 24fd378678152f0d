"""Adapters: circuitroute's routers in the mixture-of-experts layers of other stacks.

Each of them imports its stack only when it is used.
"""

from circuitroute.integrations import serving as serving
from circuitroute.integrations import transformers as transformers
