"""Write the golden values anew: ``python -m tests.golden``.

Only for a deliberate change of what the library draws or computes; the CHANGELOG says which and why.
"""

from tests.golden import values

if __name__ == "__main__":
    values.write()
