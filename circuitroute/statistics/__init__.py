"""What statisticians ask of the circuits: logits of given inclusion probabilities, and the law of a count."""
