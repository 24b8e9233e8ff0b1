"""The two stages (precompute, align) and what both stand on: preferences, models, sites, packing, scoring."""
