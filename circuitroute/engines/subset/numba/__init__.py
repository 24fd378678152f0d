"""The engine ``numba`` of the count family. All modules here but ``engine`` import numba: for functions that use it."""
