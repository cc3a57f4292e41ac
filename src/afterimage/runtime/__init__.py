"""This machine and its processes: devices, memory, threads, signals, several processes."""
