"""Cells against cells: distances between populations, neighbours, moments, copies, expected counts."""
