"""Constraints that circuitroute does not bring: a parity, and a checksum. Importing them imports no compiler."""

from circuitroute_parity.constraints import Checksum as Checksum
from circuitroute_parity.constraints import Parity as Parity
