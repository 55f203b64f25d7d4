"""Significant genes: rank-sum tests of many conditions, and how well they are found again."""
