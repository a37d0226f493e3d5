"""kdtrain: distil large language models into small ones while they are pre-trained. Imports nothing."""

__version__ = "0.1.0"
