"""The checks of `launch/check_setup.py`: what a machine and its ranks can do."""
