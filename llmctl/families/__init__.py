"""Published model families: names and configuration of their files."""
