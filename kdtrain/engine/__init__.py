"""The only user of DeepSpeed: starting ranks, the student under ZeRO, checkpoints. Importing it imports nothing."""
