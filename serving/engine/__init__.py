"""One step on one device: plan in, tokens out."""
