"""What the student learns."""
