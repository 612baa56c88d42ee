"""Home of the Triton kernels. Installed as `elang.triton_kernels`: at top level the name belongs to another project."""
