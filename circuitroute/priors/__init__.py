"""Learned distributions over subsets: probabilistic circuits with trainable weights, times constraints."""
