"""Machine and processes: devices, memory, threads, signals, the terminal, and process groups."""
