"""NBD: the listener, the negotiation, and the socket that the core gets for transmission."""
