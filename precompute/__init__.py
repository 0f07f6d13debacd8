"""The inference node: dataset and teacher in, verified shards out. The only place that knows vLLM."""
