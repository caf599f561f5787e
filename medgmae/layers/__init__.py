"""What models are built of: blocks, tables of positions, patches, masks, rotations, state spaces."""
