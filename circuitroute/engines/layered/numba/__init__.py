"""The compiled CPU engine of arbitrary circuits."""
