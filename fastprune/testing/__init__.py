"""References to check results against: the float64 oracle."""
