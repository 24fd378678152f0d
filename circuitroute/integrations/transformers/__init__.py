"""Hugging Face transformers: exact subset routing in the mixture-of-experts layers of its models.

:func:`patch` changes the routers of a model in place and returns a :class:`Handle`; :func:`load` reads a patched model
back.
"""

from circuitroute.integrations.transformers.families import supported as supported
from circuitroute.integrations.transformers.handle import Handle as Handle
from circuitroute.integrations.transformers.loading import load as load
from circuitroute.integrations.transformers.patching import get_handle as get_handle
from circuitroute.integrations.transformers.patching import own_constraints as own_constraints
from circuitroute.integrations.transformers.patching import patch as patch
