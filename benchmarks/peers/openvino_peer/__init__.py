"""OpenVINO as a peer; `__main__` runs in the peers' environment, the only one that has OpenVINO."""
