"""A soak: random constraints, logits and engines against a plain float64 truth, for as long as wanted.

``python -m tools.soak --minutes 30`` runs several processes of several threads that share circuits, watches their
memory, and writes what was covered and what was wrong as JSON lines. Every case is a function of its number:
``python -m tools.soak --case 12345`` runs that one again.
"""
