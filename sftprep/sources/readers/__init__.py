"""Files of each kind as lines of JSON."""
