"""Where knowledge comes from."""
