"""Prescribed marginals and the law of a count, beside what statisticians use for them."""
