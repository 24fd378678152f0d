"""The built-in compilers: a plug-in like any third party's. Importing this package registers them."""

from circuitroute_compilers import builtin as builtin
from circuitroute_compilers import sdd as sdd
