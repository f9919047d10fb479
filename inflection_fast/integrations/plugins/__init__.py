"""Files that other tools are given by their path."""
