"""The ops as Triton kernels: for GPUs that the compiled ones do not serve, and for what is not compiled at all.

Installed as `elang.triton_kernels`: at top level the name belongs to another project. Each module has functions of the
ops' own names and arguments, as `elang.backend` registers them. Importing one imports Triton.
"""

if __name__ != "elang.triton_kernels":
    raise ImportError(f"import elang.triton_kernels: as {__name__!r} this would be a second copy of each kernel")
