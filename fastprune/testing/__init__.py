"""What a result can be checked against: the float64 oracle."""
