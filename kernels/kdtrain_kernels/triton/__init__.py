"""Row kernels in Triton. Imported only on use, so triton need not be installed."""
