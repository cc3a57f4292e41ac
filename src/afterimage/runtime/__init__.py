"""This machine and its processes: devices, memory, threads, signals, the terminal, and process groups."""
