"""The prefill worker and its scheduler."""
