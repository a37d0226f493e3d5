"""The folder of a run: its lock, its heartbeats, its status."""
