"""The inference node: from a dataset and a teacher to verified shards. The only place that knows vLLM."""
