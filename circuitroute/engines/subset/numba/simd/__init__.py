"""A few tokens side by side in vector registers: the types and functions that the kernels compute with."""
