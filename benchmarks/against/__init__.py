"""Other libraries, on the same task, network and settings, in turns with this one."""
