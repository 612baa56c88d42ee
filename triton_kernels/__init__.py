"""Home of the Triton kernels, installed as `elang.triton_kernels`: a top-level module of that name belongs to another project."""
