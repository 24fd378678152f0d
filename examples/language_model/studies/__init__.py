"""Studies: many runs of the demo's model that differ in one thing, compared in tables and figures."""
