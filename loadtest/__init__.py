"""A stranger that loads the server over HTTP."""
