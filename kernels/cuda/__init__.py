"""What the CUDA kernels share: compilation with NVRTC and its cache, launches as data, and the GPU that runs them."""
