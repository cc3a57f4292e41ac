"""Training of a study's runs, and search for their measured bounds, as tasks on a Ray cluster, with the same results.

`driver` runs in the command's process and gives groups of runs to workers; `bounds` gives them searches; `worker` holds
the tasks that run on a worker; `cluster` connects to Ray and computes the resources of each task.
"""
