"""The operators, a file each: what PyTorch is told of it, and the operator in plain PyTorch, float32.

The plain function is the specification that faster backends are tested against, and serves every device
that has none.

Shapes: B rows, Hq query heads, H KV heads, G = Hq / H, T new queries, M pages a row, P tokens a
page, S = M P slots, d head_dim, N blocks in a pool. Slot s of a row is token s % P of the row's
page s // P, which lives in block `block_table[b, s // P]` of the pools.
"""
