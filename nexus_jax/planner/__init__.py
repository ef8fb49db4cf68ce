"""The planner: a budget in bytes in, the fastest plan that fits out."""
