"""Many random cases, and invalid arguments for every public function: `make fuzz`."""
