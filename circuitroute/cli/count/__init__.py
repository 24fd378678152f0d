"""`circuitroute count`: exact model counts of CNF files, weighted and projected ones too."""
