"""Programs for other engines' interpreters. None imports Baton: what runs there is the standard library and the peer."""
