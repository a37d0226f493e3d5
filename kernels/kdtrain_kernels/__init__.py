"""Row kernels for streamed losses: torch (and, where built, triton) only; no configuration, no process group."""
