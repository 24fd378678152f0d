"""`circuitroute report RUN.jsonl`: the log of a training run as a page of pictures."""
