"""`circuitroute explain`: what a constraint compiles to, and what it will cost."""
