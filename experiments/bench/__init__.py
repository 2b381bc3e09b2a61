"""Us against a peer on the same work in one run."""
