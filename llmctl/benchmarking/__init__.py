"""Speed measurements, and checks of the machine and network."""
