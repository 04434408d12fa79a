"""The only code that knows Ray."""
