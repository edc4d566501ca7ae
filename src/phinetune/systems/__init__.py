"""Where work runs: this process's machine, another Python environment, a container. Does not know what the work is."""
