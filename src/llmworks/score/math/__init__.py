"""Numbers and formulas in answers."""
