"""From calibration data to the top scores of every matrix, and from these to a mask."""
