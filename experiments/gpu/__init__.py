"""Every check and benchmark that needs a GPU, in one call."""
