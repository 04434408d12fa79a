"""The HTTP front: validates, admits, places, streams."""
