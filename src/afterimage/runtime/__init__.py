"""Everything about this machine and its processes: devices, memory, threads, signals, the terminal, several
processes.
"""
