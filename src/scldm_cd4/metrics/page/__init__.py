"""The page about generated cells."""
