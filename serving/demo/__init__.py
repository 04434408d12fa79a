"""The embedded model and the script that trained it."""
