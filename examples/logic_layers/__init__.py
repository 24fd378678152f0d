"""Logic layers on two tasks that make their own data: shortest paths on a grid, and labels under a class hierarchy."""
