"""What the CPU kernels share: compilation and its cache, threads, the host's vectors, the SIMD micro-kernel."""
