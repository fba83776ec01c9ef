"""Executors of the passes: this process, worker processes, or a cluster."""
