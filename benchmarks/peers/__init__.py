"""Decode steps of this project's bundles and of other runtimes at Janus-Pro-1B's layer shape.

`python -m benchmarks.peers.compare` makes an environment for the peers, builds a model of random
weights for each, and lets all of them take turns in one run.
"""
