"""Data: raw text to shards, shards to examples, positions to example ids."""
