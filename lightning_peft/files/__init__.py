"""Files that appear whole, that know when they were damaged, and that one process writes at a time."""
