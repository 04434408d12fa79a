"""What every process agrees on: errors, configuration, requests, messages. Standard library and msgspec only."""
