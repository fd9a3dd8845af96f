"""Tasks: what differs between uses of the same training loop (model, examples, loss, score)."""
