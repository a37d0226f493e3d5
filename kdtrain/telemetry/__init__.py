"""Metrics, console lines, and the sinks of records: metrics.jsonl and wandb."""
