"""The explorer of experts: a value with all that is known of them, a data file, and a page."""
