"""One file per command: parse flags into a config, call the library once, print the result to stdout."""
