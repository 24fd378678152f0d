"""The errors specific to circuitroute; all derive from :class:`CircuitRouteError`.

Bad arguments raise plain ``ValueError`` / ``TypeError``, as usual in Python.
"""

from __future__ import annotations


class CircuitRouteError(Exception):
    """Base class of circuitroute's own errors."""


class InfeasibleError(CircuitRouteError, ValueError):
    """No subset satisfies the constraint."""


class CircuitTooLargeError(CircuitRouteError, ValueError):
    """The compiled circuit would exceed the size limit; names the estimated width and the culprit."""


class UnsupportedConstraintError(CircuitRouteError, TypeError):
    """No compiler is registered for the constraint's type."""


class CircuitPropertyError(CircuitRouteError, ValueError):
    """A circuit is not smooth, decomposable or deterministic; names the offending node."""


class CircuitFileError(CircuitRouteError, ValueError):
    """A file is damaged, malformed, or not of the expected kind; names path, line, and what was found."""


class EngineError(CircuitRouteError, ValueError):
    """The requested engine does not exist or cannot run this circuit here; says why."""
