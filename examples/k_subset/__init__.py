"""Learning with k-subsets: gradient estimators side by side, exact ones and relaxations, on three tasks."""
