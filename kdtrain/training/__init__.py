"""The training loop, its checkpoints, guards and reports. Takes values; `kdtrain.jobs` reads the configuration."""
