"""A constraint as the routing function of an inference server.

Legend: T tokens, E experts, K slots per token.

vLLM and SGLang let a model bring its own routing: ``custom_routing_function(hidden_states=..., gating_output=...,
topk=..., renormalize=...)`` returns weights [T, K] float32 and ids [T, K] int32. :func:`routing_function` makes one
that takes the most probable subset of every token, as the routers of this library do in evaluation mode; or, with
``sample=True``, one that draws a subset by keys that the server hands in. :func:`greedy_groups` makes the rule that
DeepSeek's models are trained with. All are stateless: functions of their arguments.

They consist of plain tensor operations, so that ``torch.compile`` fuses them, CUDA graphs capture them, and
:func:`export` writes a program that runs without this library.
"""

from circuitroute.integrations.serving.exporting import export as export
from circuitroute.integrations.serving.function import RoutingFunction as RoutingFunction
from circuitroute.integrations.serving.function import Score as Score
from circuitroute.integrations.serving.function import routing_function as routing_function
from circuitroute.integrations.serving.greedy import GreedyGroups as GreedyGroups
from circuitroute.integrations.serving.greedy import greedy_groups as greedy_groups
from circuitroute.integrations.serving.served import ServedCombine as ServedCombine
from circuitroute.integrations.serving.served import ServedFunction as ServedFunction
