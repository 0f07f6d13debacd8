"""A whole run on real handwritten digits: data, tiny models, and every command from teacher to exported student."""
