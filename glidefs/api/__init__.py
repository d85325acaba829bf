"""The control plane: HTTP on a Unix socket, same verbs as the command line."""
