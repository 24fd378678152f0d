"""Does a dynamic k save time? Milliseconds of a mixture-of-experts layer against the experts that it executes.

``python -m benchmarks.executed --help`` for the options. A *stack* is a module in ``benchmarks/executed/stacks``: what
runs mixture-of-experts layers, in one or more *ways*. Every way is timed at a fixed top-k, at a range whose mean is
steered to given numbers of experts, and at the same decisions with every token paying for k slots, all on the same
tokens.

To add a stack, write a module there that has

- ``PACKAGES``: the modules whose versions belong in its rows. Importing the stack imports them; where that raises
  ImportError, the stack is skipped and the reason told.
- ``WAYS``: names of its ways, in the order of the table.
- ``build(way, setting) -> Layer``: the layer for a :class:`~benchmarks.executed.settings.Setting`, which has the
  tokens, the router's weight and the constraint; None for a setting that the way does not have (all have the fixed
  top-k). It raises ``UnavailableError`` where it cannot run.

Steering asks nothing of a stack: the price of an expert is a bias of the router, put into its weight, which multiplies
a hidden state that is 1 for every token. Routers take the mode, in training too (``decide="mode"``), so that both
passes execute the same experts.

Started by torchrun, every process times its own T tokens in the same order, and a row has the slowest process's times.
"""
