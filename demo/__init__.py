"""The whole chain on real handwritten digits: data, tiny models, and the run that ties them together."""
