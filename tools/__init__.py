"""What contributors run, and no user of the package does."""
