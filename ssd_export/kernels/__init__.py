"""Triton kernels: sources, launchers, the ahead-of-time compiler."""
