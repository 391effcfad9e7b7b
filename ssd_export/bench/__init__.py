"""Speed and memory of bundles beside two baselines in one run."""
