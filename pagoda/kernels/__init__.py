"""Kernels: arrays in, arrays out. They know no request, no configuration and no model.

`ops` is the public surface. Everything else here is how an op finds its implementation (`table`), what the operands
look like in memory (`weight`, `kv`), and the implementations themselves (`reference`, `cpu`, `record`).
"""
