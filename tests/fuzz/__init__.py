"""Random cases by the ten thousand, and every public door with junk: `make fuzz`."""
