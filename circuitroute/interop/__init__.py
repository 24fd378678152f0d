"""Circuits from and to other forms: files of our own, other compilers' files, networkx, sympy."""
