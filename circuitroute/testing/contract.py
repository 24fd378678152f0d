"""Everything that a constraint and its compiler promise, as one suite to inherit."""

from __future__ import annotations

from circuitroute.testing.circuits import CircuitChecks
from circuitroute.testing.composition import CompositionChecks
from circuitroute.testing.distributions import DistributionChecks
from circuitroute.testing.machines import MachineChecks
from circuitroute.testing.samples import SampleChecks
from circuitroute.testing.values import ValueChecks


class CompilerContract(ValueChecks, MachineChecks, CircuitChecks, DistributionChecks, SampleChecks, CompositionChecks):
    """Checks constraints, and the compilers for them, against their meaning on all 2^n worlds.

    Subclass it in a test module, under a name that pytest collects, and define :meth:`cases`::

        class TestParity(CompilerContract):
            def cases(self):
                for n in (1, 2, 5):
                    yield Case(Parity(odd=True), n, lambda selected: len(selected) % 2 == 1)

    It checks that

    - equal constraints are equal, hash alike and share a circuit; different ones differ; ``repr`` evaluates back
      (set :attr:`namespace` to what it needs, or to None);
    - a state machine gives the same, correct verdict along every tree;
    - the circuit is smooth, decomposable and deterministic, has the right models and counts, and is the same when
      compiled again; compiling fails if nothing is allowed or ``max_nodes`` is too small;
    - log-partition, marginals, their gradients, entropy, log-probabilities, the posterior of the count and the mode
      agree with enumeration at ordinary and extreme logits, with ties and with evidence;
    - samples are allowed, depend on nothing but logits row and key row, and follow the distribution;
    - the constraint composes with ``&``, ``|``, ``~`` and ``over``, or the error says what that takes.

    Every check can be overridden, like any method. Failures name the case, what was expected and what was found.
    """
