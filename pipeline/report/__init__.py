"""The comparison: plan, runs, records, tables, figures and the page."""
