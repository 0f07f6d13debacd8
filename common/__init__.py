"""What both halves share: configuration, samples, encodings, scores, shards. Imports no engine."""
