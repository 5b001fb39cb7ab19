"""Programs on several nodes under faults that one seed decides; see `docs/simulation.md`."""
