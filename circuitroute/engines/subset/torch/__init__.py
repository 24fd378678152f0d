"""The engine ``torch`` of the count family."""
