"""Train a study's runs as tasks on a Ray cluster, with the results of `experiments.queue`.

`driver` runs where the command runs and gives groups of runs to workers, `worker` is what a worker does, `cluster`
connects to Ray and says what a group needs of a machine.
"""
