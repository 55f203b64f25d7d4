"""Many metrics of many conditions, beside baselines, floors and ceilings; one table, and what is made of it."""
