"""Folders that other servers start from: a Triton model repository, a Docker build context."""
