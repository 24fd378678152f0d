"""Whether a circuit is smooth, decomposable and deterministic, and which node is not."""
