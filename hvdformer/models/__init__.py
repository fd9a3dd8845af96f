"""Models: plain single-device PyTorch, one file per architecture."""
