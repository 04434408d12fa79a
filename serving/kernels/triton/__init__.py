"""Device code in Triton; imported only for CUDA tensors, and by tests that run its interpreter."""
