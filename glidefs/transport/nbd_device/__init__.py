"""`/dev/nbdN` of the kernel's NBD driver, its sockets served by the core. May use `nbd` and `device`."""
