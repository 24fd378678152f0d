"""The engine ``torch`` of arbitrary circuits."""
