"""Everything with a loop, a device, a rank or a run folder in it."""
