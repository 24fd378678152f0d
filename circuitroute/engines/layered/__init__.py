"""Any circuit, level by level."""

from circuitroute.engines.layered.naive import NaiveLayered as NaiveLayered
