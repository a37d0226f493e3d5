"""Row kernels in Triton. Imported only where they are used: triton need not be installed."""
