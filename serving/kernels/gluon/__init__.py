"""Device code in Gluon, the explicit layer of Triton; imported only for CUDA tensors."""
