"""Train a study's runs, and find their measured bounds, as tasks on a Ray cluster, with the results of this process.

`driver` runs in the command and gives groups of runs to workers, `bounds` gives them searches, `worker` is a worker's
side, and `cluster` connects to Ray and finds what a task needs of a machine.
"""
