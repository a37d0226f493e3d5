"""What a run will need, from shapes and settings alone, before anything is allocated."""
