"""Triton kernels of the count family. Importing what lies here imports triton."""
