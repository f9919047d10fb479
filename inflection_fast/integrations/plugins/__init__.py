"""Plugins that other tools load by the path of their file."""
