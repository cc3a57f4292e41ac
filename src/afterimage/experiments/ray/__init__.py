"""Train a study's runs as tasks on a Ray cluster, with the results of `experiments.queue`.

`driver` runs in the command and gives groups of runs to workers, `worker` is a worker's side, and `cluster` connects
to Ray and finds what a group needs of a machine.
"""
