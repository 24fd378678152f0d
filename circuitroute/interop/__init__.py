"""Circuits from and to other forms: saved circuits, other compilers' files, networkx, sympy, pictures."""
