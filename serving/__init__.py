"""Baton: prefill and decode on separate workers, and everything both of them stand on."""
