"""Metrics, the console, and where records go: metrics.jsonl, wandb, the run folder."""
