"""What tests of distributed code need."""
