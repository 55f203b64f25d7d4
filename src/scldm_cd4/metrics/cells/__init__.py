"""Cells to numbers: genes matched by name, counts checked, conditions, pseudobulks, components."""
