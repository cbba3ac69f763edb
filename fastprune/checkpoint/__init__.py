"""Files of a model on disk: load, stream, patch and undo."""
