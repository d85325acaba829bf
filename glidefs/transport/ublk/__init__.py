"""ublk: block devices of this kernel, and which kernels survive them."""
