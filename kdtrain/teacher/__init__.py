"""Teachers: online and dedicated models, their signals, sparse targets."""
