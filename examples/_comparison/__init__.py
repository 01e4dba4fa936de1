"""Parts that the two training examples share: variants, data, training, comparison, report."""
