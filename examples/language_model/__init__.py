"""The demo behind `circuitroute demo`: three small MoE language models that differ in their router alone."""
