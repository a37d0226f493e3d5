"""One module per launch script, and what they share. Reads the whole configuration and builds the objects of a run."""
