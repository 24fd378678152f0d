"""Learned distributions over subsets: probabilistic circuits with trainable weights, and their products with constraints."""
