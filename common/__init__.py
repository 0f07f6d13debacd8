"""Code that both halves share.

`data` reads datasets, images and conversations, `shards` is the format of outputs, `storage` reads and writes files;
`config`, `errors`, `console`, `concurrency` and `estimates` serve the commands. Imports no engine and no torch.
"""
