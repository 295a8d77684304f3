"""What is computed: formats, ops (one file an op), nodes and graphs, rewrites."""
