"""Models: one file per paper, in one folder per family, on the shared parts in `parts/`."""
