"""Code that precompute/ and train/ share: errors, configuration, datasets, shards, storage. Imports no engine."""
