"""Transports: how guests reach a volume. ublk is a block device, NBD a socket."""
