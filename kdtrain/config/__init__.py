"""What a run is: its settings, where they come from, and whether they can work. Imports neither torch nor numpy."""
