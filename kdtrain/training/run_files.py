"""Names in a run folder and in the state of a checkpoint."""

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints, inside the run folder."""
MODEL = "model"
"""Folder inside the run folder with the student's tokenizer and the generation_config.json of its weights."""
VOCAB_SIZE = "vocab_size"
"""In a checkpoint's state: number of ids of the run's softmax; rows from there on are not exported."""
