"""Many adaptations, one table: plan, run, statistics, report."""
