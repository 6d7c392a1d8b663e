"""What the command line does beyond a single ``fit``: comparisons of methods over seeds."""
