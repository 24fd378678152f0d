"""A circuit and logits: the distribution over the allowed subsets, and circuits that can be called for one."""
