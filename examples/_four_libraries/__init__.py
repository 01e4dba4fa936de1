"""One training run, written once for each library."""
