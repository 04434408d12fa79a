"""DeepSeek-V3 in reading order, its configuration, its weights."""
