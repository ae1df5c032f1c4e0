"""The commands that train, one file each, and what begins, runs and finishes them."""
