"""vhost-user-blk: the protocol with front-ends. The rings are served in ``csrc/transport/vhost``."""
