"""What the general rules for tiny models do not tell: settings and inputs of single types."""

SETTINGS: dict[str, dict] = {}
INPUTS: dict = {}
