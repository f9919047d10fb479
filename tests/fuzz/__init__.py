"""Random inputs for operators, files and configurations, against float64 and stated errors: `python -m tests.fuzz`."""
