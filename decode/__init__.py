"""The decode worker and its scheduler."""
