"""Logits to a decision per token: which experts, with what weights, and how gradients cross the choice."""
