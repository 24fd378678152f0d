"""The demo behind `circuitroute demo`, and its studies: small MoE language models that differ in their router alone."""
