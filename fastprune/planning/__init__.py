"""How a pass is cut into segments for a budget of memory, and what it will take."""
