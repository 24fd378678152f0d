"""Behind :func:`circuitroute.route_batch` and :func:`circuitroute.route_sequence`: what is decided for tokens together.

``batch_choice`` has the set of experts that a batch is given, ``batch_needs`` what its tokens cannot do without,
``sequence_budget`` the count potentials of a total over tokens, and ``wrapped`` a decision with more told about it.
"""
