"""The cases of `baton bench kernels`, by family: what each kernel is given, what that costs at the least, and who else computes it."""
