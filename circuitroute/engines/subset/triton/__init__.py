"""The engine ``triton`` of the count family. All but ``engine`` import triton: for functions that use it."""
