"""The command line."""

from circuitroute.cli.main import main as main
