"""`baton bench`: measurements with their machine, versions and command, as JSON. Everything is measured from outside, peers the same way."""
