"""The composition root and the loop."""
