"""Everything a constraint and its compiler promise, as one suite to inherit."""

from __future__ import annotations

from circuitroute.testing.circuits import CircuitChecks
from circuitroute.testing.composition import CompositionChecks
from circuitroute.testing.distributions import DistributionChecks
from circuitroute.testing.machines import MachineChecks
from circuitroute.testing.samples import SampleChecks
from circuitroute.testing.values import ValueChecks


class CompilerContract(ValueChecks, MachineChecks, CircuitChecks, DistributionChecks, SampleChecks, CompositionChecks):
    """Holds constraints, and whatever compiles them, to their meaning on all 2^n worlds.

    Subclass it in a test module, under a name that pytest collects, and give :meth:`cases`::

        class TestParity(CompilerContract):
            def cases(self):
                for n in (1, 2, 5):
                    yield Case(Parity(odd=True), n, lambda selected: len(selected) % 2 == 1)

    It checks that

    - equal constraints are equal, hash alike and share a circuit; different ones differ; ``repr`` evaluates back
      (set :attr:`namespace` to what it needs, or to None);
    - a state machine gives the same verdict along every tree, and the right one;
    - the circuit is smooth, decomposable and deterministic, has the right models and counts, is refused where nothing
      is allowed or ``max_nodes`` is too small, and is the same when compiled again;
    - log-partition, marginals, their gradients, entropy, log-probabilities, the posterior of the count and the mode
      agree with enumeration at ordinary and extreme logits, with ties and with evidence;
    - samples are allowed, are functions of logits row and key row, and follow the distribution;
    - it composes with ``&``, ``|``, ``~`` and ``over``, or says what it would need to.

    Every check can be overridden, like any method; failures name the case, what was expected and what was found.
    """
