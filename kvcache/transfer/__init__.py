"""Moving pages from a prefill worker to a decode worker."""
