"""Compiled loops of the engine ``numba``. Importing the modules here imports numba: for functions that use it."""
