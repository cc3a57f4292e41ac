"""Training of a study's runs, and search for their measured bounds, as tasks on a Ray cluster, with the same results.

`driver` runs in the command's process and gives groups of runs, and searches, to workers; `worker` holds what runs on a
worker; `cluster` connects to Ray, computes the resources of each task and follows the tasks.
"""
